"""Which prompts go through the model together, and which batches walk in step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zarrtrace.capture.encoder_prefetch import KeptEncoders
from zarrtrace.capture.host import to_device
from zarrtrace.capture.lockstep import Pass, Step
from zarrtrace.capture.model import LoadedModel
from zarrtrace.capture.prompts import Prompt
from zarrtrace.capture.rope import rope_sides
from zarrtrace.errors import ModelError
from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.layer_batches import Member

if TYPE_CHECKING:
    from zarrtrace.capture.saes import SAESource

# Bytes that all batches of a wave may hold between two blocks. A wave walks through the layers
# once, so SAEs are loaded once a wave; on a GPU, where that takes longest, once in all but huge
# runs.
_ON_GPU = 2**30
# Elsewhere as much as a third of an encoder, and at least this: loading small ones takes time, too.
_AT_LEAST = 8 * 2**20


@dataclass(frozen=True)
class Request:
    """The layers and rows still wanted of one prompt.

    Attributes
    ----------
    prompt
        The tokenised scenario.
    layers
        Layers whose records are wanted.
    next_token
        Whether its most likely continuations are wanted.
    blocked
        Whether attention is computed by blocks of queries (:mod:`zarrtrace.capture.blocked`).
    positions
        Token positions that are wanted, ascending; None for all.
    attention_positions
        Positions whose rows of attention are wanted; None for all of the prompt.
    """

    prompt: Prompt
    layers: frozenset[int]
    next_token: bool
    blocked: bool = False
    positions: tuple[int, ...] | None = None
    attention_positions: tuple[int, ...] | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is wanted."""
        return not self.layers and not self.next_token

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.tokens.ids)

    @property
    def rows(self) -> int:
        """Number of wanted token positions."""
        return self.length if self.positions is None else len(self.positions)

    def member(self) -> Member:
        """Return the prompt as records of a batch name it."""
        chosen = self.attention_positions
        rows = self.length if chosen is None else len(chosen)
        return Member(self.prompt.scenario.name, self.length, self.rows, rows)


class Batch:
    """Prompts that go through the model together, padded on the right.

    Parameters
    ----------
    model
        The model, with taps on it.
    requests
        Its sequences.
    attention
        Whether attention probabilities are wanted.
    """

    def __init__(
        self, model: LoadedModel, requests: Sequence[Request], *, attention: bool = True
    ) -> None:
        self._model, self._attention = model, attention
        self.requests = requests
        self.lengths = [request.length for request in requests]
        self.rows = [request.rows for request in requests]
        self.members = [request.member() for request in requests]
        self.layers = frozenset[int]().union(*(request.layers for request in requests))
        self.next_token = any(request.next_token for request in requests)
        self.done = all(request.done for request in requests)
        self._pass: Pass | None = None
        self._stored: torch.Tensor | None = None
        #: Positions of the rows of attention that are wanted ``(sequence, row)``; None for all.
        self.attention_rows: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._model.device

    def held_bytes(self) -> int:
        """Size of what the batch holds between two blocks.

        That is the mask, and the residual stream three times: the embeddings, and the input and
        output of the block behind which it pauses.
        """
        itemsize = torch.empty(0, dtype=self._model.model.dtype).element_size()
        longest = max(self.lengths)
        mask = 0 if self.requests[0].blocked else longest
        return len(self.requests) * longest * (3 * self._model.d_model + mask) * itemsize

    def advance(self) -> Step:
        """Go on to the next step."""
        if self._pass is None:
            self._pass = self._start()
        return self._pass.advance()

    def _start(self) -> Pass:
        shape = (len(self.requests), max(self.lengths))
        ids = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, request in enumerate(self.requests):
            ids[row, : self.lengths[row]] = torch.tensor(request.prompt.tokens.ids)
            mask[row, : self.lengths[row]] = 1
        device = self._model.device
        first = self.requests[0]
        if len(self.requests) > 1 or first.positions is not None:
            # Found here: to look for them on a GPU is to wait for it.
            stored = [
                row * shape[1] + position
                for row, request in enumerate(self.requests)
                for position in request.positions or range(request.length)
            ]
            self._stored = to_device(torch.tensor(stored), device)
        chosen = _padded([one.attention_positions for one in self.requests], self.lengths)
        self.attention_rows = None if chosen is None else to_device(chosen, device)
        rows = _padded([one.positions for one in self.requests], self.lengths)
        rows_of = first.layers if self._attention else frozenset[int]()
        return Pass(
            self._model,
            to_device(ids, device),
            to_device(mask, device),
            rows=None if rows is None else to_device(rows, device),
            blocked=(rows_of, first.attention_positions) if first.blocked else None,
        )

    def stop(self) -> None:
        """End the pass where it is."""
        if self._pass is not None:
            self._pass.stop()
            self._pass = None

    def tokens(self, padded: torch.Tensor, width: int) -> torch.Tensor:
        """Take the wanted tokens ``(token, width)`` of ``(sequence, token, width)``.

        Raises
        ------
        ModelError
            If the model passes on something else than one vector of this width a token.
        """
        expected = len(self.requests), max(self.lengths), width
        if padded.shape != expected:
            raise ModelError(
                f"{self._model.attributes.id}: a hook point gives an array of shape "
                f"{tuple(padded.shape)}, not {expected}",
                why="SAEs and the array residual take one vector a token. Some models pass on "
                "several, or the SAEs are those of another model.",
                remedy="Use --no-features without --residual, or choose other SAEs.",
            )
        return padded[0] if self._stored is None else padded.flatten(0, 1)[self._stored]


def _padded(
    positions: Sequence[tuple[int, ...] | None], lengths: Sequence[int]
) -> torch.Tensor | None:
    """Return positions ``(sequence, row)``, 0 behind the last; None if all are wanted."""
    if all(one is None for one in positions):
        return None
    each = [
        torch.arange(length) if one is None else torch.tensor(one, dtype=torch.long)
        for one, length in zip(positions, lengths, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(each, batch_first=True)


def batches(
    model: LoadedModel, requests: Sequence[Request], size: int, *, attention: bool = True
) -> list[Batch]:
    """Make the batches of some requests, as :func:`grouped` puts them together."""
    lengths, alone = [one.length for one in requests], [one.blocked for one in requests]
    return [
        Batch(model, [requests[at] for at in group], attention=attention)
        for group in grouped(model, lengths, alone, size)
    ]


def grouped(
    model: LoadedModel, lengths: Sequence[int], alone: Sequence[bool], size: int
) -> list[list[int]]:
    """Group scenarios of similar length; what is together depends on nothing but the suite.

    Some groups that follow each other, given without the others, are grouped as here. No group is
    on both sides of a length at which rotary embeddings change (:mod:`zarrtrace.capture.rope`).

    Parameters
    ----------
    model
        The model; only its configuration counts.
    lengths
        Tokens of each scenario.
    alone
        Which ones must be alone: those whose attention is computed by blocks of queries.
    size
        Scenarios in a group.

    Returns
    -------
    list of list
        Their indices.
    """
    together = [at for at, single in enumerate(alone) if not single]
    if size > 1:
        together.sort(key=lambda at: lengths[at])
    sides = rope_sides(model, lengths)
    groups: list[list[int]] = []
    for _, side in itertools.groupby(together, key=lambda at: sides[at]):
        here = list(side)
        groups += [here[start : start + size] for start in range(0, len(here), size)]
    return groups + [[at] for at, single in enumerate(alone) if single]


def default_batch_size(model: LoadedModel, lengths: Iterable[int]) -> int:
    """Choose how many prompts go through the model together: 1 on a CPU.

    On a GPU as many as keep three attention matrices of a block and one layer of 32,768 features
    within a tenth of its free memory, 32 at most: more are no faster.
    """
    if model.device.type != "cuda":
        return 1
    longest = max(lengths, default=1)
    itemsize = torch.empty(0, dtype=model.model.dtype).element_size()
    each = longest * (3 * model.n_heads * longest * itemsize + 2 * 4 * 32_768)
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(32, free // 10 // each))


def goes_in_several_waves(model: LoadedModel, found: Sequence[Batch]) -> bool:
    """Whether a GPU needs each encoder more than once, so that it had better keep them."""
    if model.device.type != "cuda" or model.is_streamed:
        return False
    return sum(batch.held_bytes() for batch in found) > _ON_GPU


def waves(
    model: LoadedModel,
    found: Sequence[Batch],
    saes: Sequence[SAEAttributes],
    source: SAESource | None = None,
) -> Iterator[list[Batch]]:
    """Cut batches into groups that together stay within what may be held between two blocks.

    In a computer's own memory that is a third of one encoder, so that many scenarios need no more
    memory than few: dozens of scenarios then share each SAE, which takes the time of one or two to
    load. Without SAEs, or once the source keeps all of them, nothing is shared: each batch goes its
    way alone, and its traces are complete long before the last ones.
    """
    left = deque(found)
    while left:
        budget = _held_at_most(model, saes, source)
        wave = [left.popleft()]
        held = wave[0].held_bytes()
        while left and held + left[0].held_bytes() <= budget:
            wave.append(left.popleft())
            held += wave[-1].held_bytes()
        yield wave


def _held_at_most(
    model: LoadedModel, saes: Sequence[SAEAttributes], source: SAESource | None
) -> int:
    kept = isinstance(source, KeptEncoders) and source.has(saes, model.device)
    if not model.is_streamed and (not saes or kept):
        return 0
    if model.device.type == "cuda":
        return _ON_GPU
    return max((max(_AT_LEAST, 4 * sae.d_in * sae.d_sae // 3) for sae in saes), default=0)
