"""How a prompt is continued: the settings of sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zarrtrace.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Settings with which the model goes on after a prompt.

    Attributes
    ----------
    tokens
        Most tokens of a continuation.
    temperature
        Divisor of the logits; 0 takes the most likely token each time (greedy).
    top_p
        Share of probability, of the most likely tokens, that is sampled from.
    samples
        Continuations of each scenario.
    seed
        Together with a scenario's name and the number of its repeat, all that chance depends on.
    stop
        Texts that end a continuation in which they appear.

    Raises
    ------
    ConfigError
        If a setting has no meaning, or none together with the others.
    """

    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_numbers()
        if "" in self.stop:
            raise ConfigError(
                "--stop: a stop text is empty",
                why="Every continuation contains the empty text.",
                remedy="Leave it out, or give the text that ends a continuation.",
            )
        if self.is_greedy and self.samples > 1:
            raise ConfigError(
                f"--samples {self.samples} without --temperature",
                why="At temperature 0 all continuations of a prompt are the same.",
                remedy="Give a --temperature above 0, such as 1, or leave out --samples.",
            )
        if self.is_greedy and self.top_p < 1:
            raise ConfigError(
                f"--top-p {self.top_p:g} without --temperature",
                why="At temperature 0 only the most likely token is taken.",
                remedy="Give a --temperature above 0, such as 1, or leave out --top-p.",
            )

    def _check_numbers(self) -> None:
        numbers = (
            ("--generate", self.tokens, self.tokens >= 1, "at least 1 token"),
            (
                "--temperature",
                self.temperature,
                math.isfinite(self.temperature) and self.temperature >= 0,
                "0 or a positive number",
            ),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--samples", self.samples, self.samples >= 1, "at least 1"),
            ("--seed", self.seed, self.seed >= 0, "0 or a positive integer"),
        )
        for option, value, holds, rule in numbers:
            if not holds:
                raise ConfigError(
                    f"{option} {value}: not possible", remedy=f"Give a value that is {rule}."
                )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken each time."""
        return self.temperature == 0
