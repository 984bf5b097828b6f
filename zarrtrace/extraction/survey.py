"""The samples of a table before any is computed: which there are, and what is known of them.

A table's arrays have as many rows as there are samples, so all prompts are tokenised before the
first one goes through the model. Their texts are not kept, and their ids are in a temporary file.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.scenarios import DECISION, Scenario, trace_name

if TYPE_CHECKING:
    from zarrtrace.capture import Prompt

_ID_BYTES = 4
# Types of arrays for columns of numbers, which have one type in all scenarios.
_CODES = {float: "d", int: "q"}
#: Stands for an option that a scenario lacks.
NO_OPTION = -1
# Beginnings of names of arrays that are no coordinates along `sample`.
_ARRAYS = ("features", "feature_", "next_token", "residual", "sae_", "top_")


@dataclass(frozen=True)
class Survey:
    """Facts about all samples of a table.

    Attributes
    ----------
    starts
        Number of each scenario's first sample, and of all samples last.
    coordinates
        Values along ``sample`` by coordinate.
    digest
        Hash of all scenarios, and of what the tokenizer makes of them.
    spans, options, metadata
        Names that occur, in order of first use; ``decision`` last.
    longest
        Most tokens that a prompt has, or may have with a continuation.
    tokens
        Number of each scenario's first token among those of all, and of all tokens last.
    ids
        A file of the ids of all tokens, uint32.
    chat_template
        Hash of the template that made prompts of chats; None if there are no chats.
    """

    starts: np.ndarray
    coordinates: Mapping[str, np.ndarray]
    digest: str
    spans: tuple[str, ...]
    options: tuple[str, ...]
    metadata: tuple[str, ...]
    longest: int
    tokens: np.ndarray
    ids: IO[bytes]
    chat_template: str | None = None

    @property
    def scenarios(self) -> int:
        """Number of scenarios."""
        return len(self.starts) - 1

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.starts[-1])

    def chosen(self, first: int, stop: int) -> list[tuple[str, list[int], tuple[int, ...]]]:
        """Return name, ids of all tokens and positions of the samples of some scenarios.

        A repeat of a scenario is named as a trace is.
        """
        start, end = (int(self.tokens[at]) for at in (first, stop))
        self.ids.seek(_ID_BYTES * start)
        ids = np.frombuffer(self.ids.read(_ID_BYTES * (end - start)), np.uint32)
        of_each = np.split(ids, self.tokens[first + 1 : stop] - start)
        positions, repeats = self.coordinates["position"], self.coordinates.get("repeat")
        names = self.coordinates["scenario"]
        rows = [slice(*edges) for edges in itertools.pairwise(self.starts[first : stop + 1])]
        return [
            (
                trace_name(names[row.start], None if repeats is None else int(repeats[row.start])),
                own.tolist(),
                tuple(positions[row].tolist()),
            )
            for row, own in zip(rows, of_each, strict=True)
        ]

    def groups(self, most: int, done: int = 0) -> list[tuple[int, int]]:
        """Cut scenarios into groups of at most `most` samples, or of one scenario.

        Groups depend on nothing but the suite, so that a resumed table is computed in the same
        batches as an uninterrupted one.

        Parameters
        ----------
        done
            Samples that are stored: groups of these alone are left out.

        Returns
        -------
        list of tuple
            First scenario of each group, and the one behind its last.
        """
        found, first = [], 0
        for stop in range(1, self.scenarios + 1):
            is_last = stop == self.scenarios
            if is_last or self.starts[stop + 1] - self.starts[first] > most:
                if self.starts[stop] > done:
                    found.append((first, stop))
                first = stop
        return found


@dataclass
class _Samples:
    """Values along ``sample``, as they are found."""

    scenario: list[str] = field(default_factory=list)
    position: array[int] = field(default_factory=lambda: array("q"))
    token: list[str] = field(default_factory=list)
    token_id: array[int] = field(default_factory=lambda: array("q"))
    # Empty if it is not known of a prompt.
    special: array[int] = field(default_factory=lambda: array("b"))
    span: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    # Token ids of continuations; empty if there are none.
    repeat: array[int] = field(default_factory=lambda: array("q"))
    generated: array[int] = field(default_factory=lambda: array("b"))
    choice: list[str] = field(default_factory=list)
    options: dict[str, array[int]] = field(default_factory=dict)
    # One value a scenario; several samples share it.
    metadata: dict[str, Any] = field(default_factory=dict)


def survey(
    prompts: Iterable[Prompt],
    positions: Callable[[Prompt], Sequence[int] | None],
    digest: Callable[[Prompt], str],
    ids: IO[bytes],
) -> Survey:
    """Look at all prompts once.

    Parameters
    ----------
    prompts
        The tokenised scenarios, in order.
    positions
        Which positions of a prompt are samples, ascending; None for all.
    digest
        Hashes a prompt.
    ids
        An empty file, in which the ids of all tokens are kept.

    Raises
    ------
    ScenarioError
        If a tag holds a comma, or there is no sample.
    """
    found, starts, hashes = _Samples(), array("q", [0]), hashlib.blake2b(digest_size=8)
    spans: dict[str, None] = {}
    texts: dict[str, str] = {}  # equal texts are kept once
    longest, template, tokens = 0, None, array("q", [0])
    for prompt in prompts:
        where = positions(prompt)
        where = range(len(prompt.tokens.ids)) if where is None else where
        _add(found, prompt, where, texts)
        starts.append(starts[-1] + len(where))
        spans |= dict.fromkeys(prompt.spans)
        if (chat := prompt.scenario.chat) is not None:
            template = chat.template
        longest = max(longest, _most_tokens(prompt))
        tokens.append(tokens[-1] + len(prompt.tokens.ids))
        ids.write(np.asarray(prompt.tokens.ids, np.uint32).tobytes())
        hashes.update(digest(prompt).encode())
    if not starts[-1]:
        raise ScenarioError("no scenario has such a position", remedy="Give other positions.")
    edges = np.asarray(starts)
    names = [name for name in spans if name != DECISION]
    return Survey(
        starts=edges,
        coordinates=_coordinates(found, np.diff(edges)),
        digest=hashes.hexdigest(),
        spans=(*names, DECISION) if DECISION in spans else tuple(names),
        options=tuple(found.options),
        metadata=tuple(found.metadata),
        longest=longest,
        tokens=np.asarray(tokens),
        ids=ids,
        chat_template=template,
    )


def _most_tokens(prompt: Prompt) -> int:
    """Return how many tokens a prompt has, or may have with another continuation."""
    if (continued := prompt.continued) is None:
        return len(prompt.tokens.ids)
    return continued.generation.prompt_tokens + continued.generation.tokens


def _tags_of(scenario: Scenario) -> str:
    """Return the tags of a scenario as one text.

    Raises
    ------
    ScenarioError
        If one holds a comma.
    """
    for tag in scenario.tags:
        if "," in tag:
            raise ScenarioError(
                f"scenario {scenario.name!r}: its tag {tag!r} holds a comma",
                why="A table keeps the tags of a scenario as one text with commas between them.",
                remedy="Choose another tag.",
            )
    return ",".join(scenario.tags)


def _add(found: _Samples, prompt: Prompt, where: Sequence[int], texts: dict[str, str]) -> None:
    """Add the samples of one scenario."""
    scenario, tokens = prompt.scenario, prompt.tokens
    tags, continued = _tags_of(scenario), prompt.continued
    name = scenario.name if continued is None else continued.prompt.scenario.name
    if continued is not None:
        found.choice += [continued.choice or ""] * len(where)
        found.generated.extend(at >= continued.generation.prompt_tokens for at in where)
        found.repeat.extend([continued.repeat] * len(where) if continued.repeat is not None else ())
    before = len(found.position)
    for at in where:
        names = ",".join(one for one, span in prompt.spans.items() if at in span.tokens)
        found.scenario.append(name)
        found.position.append(at)
        found.token.append(texts.setdefault(tokens.texts[at], tokens.texts[at]))
        found.token_id.append(tokens.ids[at])
        if tokens.special is not None:
            found.special.append(tokens.special[at])
        found.span.append(texts.setdefault(names, names))
        found.tags.append(texts.setdefault(tags, tags))
    for name in prompt.options:
        if name not in found.options:
            found.options[name] = array("q", [NO_OPTION]) * before
    for name, ids in found.options.items():
        option = prompt.options.get(name)
        ids.extend([NO_OPTION if option is None else option.token_id] * len(where))
    for name, value in scenario.metadata.items():
        if name not in found.metadata:  # numbers as such: Python's take four times the memory
            code = _CODES.get(type(value))
            found.metadata[name] = array(code) if code else []
        found.metadata[name].append(value)


def _coordinates(found: _Samples, counts: np.ndarray) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {
        "scenario": np.array(found.scenario, object),
        "position": np.asarray(found.position),
        "token": np.array(found.token, object),
        "token_id": np.asarray(found.token_id).astype(np.uint32),
        "special": np.asarray(found.special, bool),
        "span": np.array(found.span, object),
        "tags": np.array(found.tags, object),
    }
    if len(found.special) < len(found.position):
        del out["special"]
    if found.repeat:
        out["repeat"] = np.asarray(found.repeat)
    if found.choice:
        out["generated"] = np.asarray(found.generated).astype(bool)
        out["choice"] = np.array(found.choice, object)
    for name, ids in found.options.items():
        out[f"option_{name}"] = np.asarray(ids)
    for name, values in found.metadata.items():
        if name in out or name.startswith(_ARRAYS):
            raise ConfigError(
                f"metadata {name!r} has a name that arrays of the table have",
                why="In a table, columns of metadata are coordinates of its arrays.",
                remedy="Give the column another name.",
            )
        kind = object if isinstance(values[0], str) else None
        out[name] = np.repeat(np.array(values, kind), counts)
    return out
