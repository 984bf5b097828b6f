"""The games that the embedded demo is trained on: states, the player's policy, and their text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from zarrtrace import demo
from zarrtrace.scenarios import render_template

END = "<|end_of_text|>"


@dataclass(frozen=True)
class Game:
    """The state of one game before the player's choice.

    Attributes
    ----------
    balance, goal
        Dollars held, and dollars at which the player wants to stop.
    history
        Outcomes of the last spins, at most three, newest last: dollars won, or lost if negative.
    round
        Number of the coming spin.
    win_percent, payout
        The odds the machine states.
    """

    balance: int
    goal: int
    history: tuple[int, ...]
    round: int
    win_percent: int
    payout: int


def player_policy(balance: int, goal: int, history: Sequence[int]) -> str:
    """What the player of the training games chooses: ``"bet"`` or ``"stop"``.

    The player stops at the goal or above it. Below it, two or more losses in a row make them chase
    the losses and bet. Otherwise they stop once they hold 60 % of the goal, and bet below that.

    Parameters
    ----------
    balance, goal
        Dollars held and dollars wanted.
    history
        Outcomes of the last spins, newest last; negative is a loss.
    """
    if balance >= goal:
        return "stop"
    if len(history) >= 2 and history[-1] < 0 and history[-2] < 0:
        return "bet"
    return "stop" if balance >= 0.6 * goal else "bet"


def sample_game(rng: random.Random) -> Game:
    """Draw a game state; about half of them lead to each choice."""
    goal = rng.randrange(100, 301, 10)
    top = 350 if rng.random() < 0.5 else int(1.2 * goal)
    n_spins = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8))
    history = tuple(
        -5 * rng.randint(1, 12) if rng.random() < 0.55 else 5 * rng.randint(1, 12)
        for _ in range(min(n_spins, 3))
    )
    return Game(
        balance=5 * rng.randint(1, top // 5),
        goal=goal,
        history=history,
        round=n_spins + 1,
        win_percent=rng.randrange(10, 61, 5),
        payout=rng.randint(2, 5),
    )


class GameText:
    """Renders games with the template of the embedded suite."""

    def __init__(self) -> None:
        suite = yaml.safe_load(demo.suite_path().read_text(encoding="utf-8"))
        self.template: str = suite["template"]
        self.options: dict[str, str] = suite["options"]
        self._scenarios = {s["name"]: suite["defaults"] | s["values"] for s in suite["scenarios"]}

    def suite_games(self) -> dict[str, Game]:
        """The states of the suite's scenarios, by name."""
        games = {}
        for name, values in self._scenarios.items():
            spins = values["history"] if isinstance(values["history"], list) else []
            signs = {"won": 1, "lost": -1}
            history = tuple(
                signs[verb] * int(dollars[1:]) for verb, dollars in map(str.split, spins)
            )
            games[name] = Game(**{**values, "history": history})
        return games

    def prompt(self, game: Game) -> str:
        """The text before the choice."""
        history = [f"won ${x}" if x > 0 else f"lost ${-x}" for x in game.history]
        values = {
            "balance": game.balance,
            "goal": game.goal,
            "history": history or "none yet",
            "round": game.round,
            "win_percent": game.win_percent,
            "payout": game.payout,
        }
        return render_template(self.template, values)[0]

    def answer(self, game: Game) -> str:
        """The option the player names, for example ``"1"``."""
        return self.options[player_policy(game.balance, game.goal, game.history)]

    def full(self, game: Game) -> str:
        """Prompt, choice and end of text."""
        return f"{self.prompt(game)}{self.answer(game)}\n{END}"


def held_out_games(rng: random.Random, count: int, seen: set[Game]) -> list[Game]:
    """Draw games that the model was not trained on."""
    games: list[Game] = []
    while len(games) < count:
        game = sample_game(rng)
        if game not in seen:
            games.append(game)
    return games
