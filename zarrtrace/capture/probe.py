"""A probe of the loaded model on random tokens: whether, and in which ways, it may be captured.

The model's first blocks, up to the last that is unlike those before it, run two short prompts in
every way in which prompts are captured. A model whose attention is not what a trace says of it is
refused; a way that differs from the plain one by more than rounding is not permitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from zarrtrace.capture.blocked import AttentionRows
from zarrtrace.capture.comparison import distance, other_rounding, within_rounding
from zarrtrace.capture.limits import DEFAULT_CAPTURE_LIMITS, CaptureLimits
from zarrtrace.capture.lockstep import BlockState, Logits, Pass, taps
from zarrtrace.capture.messages import forward_errors, full_memory
from zarrtrace.capture.model import LoadedModel, Permitted
from zarrtrace.capture.modules import find_decoder, not_exact
from zarrtrace.errors import ModelError

# Lengths that no head has as its size, and about a third of the longer one.
_LONG, _SHORT = 47, 29
_IN_BLOCKS = CaptureLimits(block_bytes=1, block_rows=16)
_IN_PARTS = CaptureLimits(logit_rows=16, mlp_tokens=16)
# Longer than the pieces into which some attention cuts a prompt.
_LONGER = 131
# Attributes that differ between blocks of one kind.
_INDICES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number"})


def probe_model(model: LoadedModel) -> LoadedModel:
    """Return the model with its permitted ways, and attention only where it gives a matrix.

    Raises
    ------
    ModelError
        If the model cannot be captured exactly.
    """
    ids = random_tokens(model, _LONG)
    # Found again: Big Bird exchanges its attention modules when it first runs.
    decoder = find_decoder(model.model, model.attributes.id)
    model = replace(model, decoder=decoder, permitted=Permitted())
    with full_memory(model.attributes.id, model.device):
        with _first_blocks(model) as first:
            try:
                return _probed(model, first, ids)
            except ModelError:
                if len(first.blocks) == len(model.blocks):
                    raise
        return _probed(model, model, ids)  # some models run all of their blocks, or fail


def _probed(model: LoadedModel, first: LoadedModel, ids: torch.Tensor) -> LoadedModel:
    """Probe `first`, which is `model` or its first blocks."""
    long, short = ids[:1], ids[1:, : ids.shape[1] * _SHORT // _LONG]
    [plain] = _observe(first, [long])
    without = _without_matrix(first, plain)
    model, first = _restricted(model, without), _restricted(first, without)
    plain.drop_attention(set(plain.attention) - set(first.attentions))
    [alone] = _observe(first, [short])
    with other_rounding(first):
        [noise] = _observe(first, [long])
    same = _Comparison(first, plain, noise)
    for observed in (plain, *_observe(first, [random_tokens(model, _LONGER)[:1]])):
        _check_matrices(first, observed)
    _check_recorded(first, plain, _recorded(first, long), same)
    last = ids.shape[1] - 1
    chosen = tuple(sorted({0, last // 2, last}))
    permitted = Permitted(
        blocks=all(
            same.holds([(plain, long)], _IN_BLOCKS, (frozenset(first.attentions), queries))
            for queries in (None, chosen)
        ),
        batches=not _selects_keys(first) and same.holds([(plain, long), (alone, short)]),
        parts=same.holds([(plain, long)], _IN_PARTS),
    )
    return replace(model, permitted=permitted)


@contextmanager
def _first_blocks(model: LoadedModel) -> Iterator[LoadedModel]:
    """Let the model run its first blocks alone: two, or up to the last of a new kind.

    With --low-memory, each block is copied to the device, perhaps from a disk. Blocks of one kind
    compute the same way, so two are enough.
    """
    kinds: set[Any] = set()
    count = min(2, len(model.blocks))
    for index, block in enumerate(model.blocks):
        kind = tuple((type(module), *_numbers(module)) for module in block.modules())
        if kind not in kinds:
            kinds.add(kind)
            count = max(count, index + 1)
    decoder = model.decoder
    attentions = {at: one for at, one in decoder.attentions.items() if at < count}
    whole = getattr(decoder.module, decoder.list_name)
    setattr(decoder.module, decoder.list_name, nn.ModuleList(decoder.blocks[:count]))
    try:
        yield replace(
            model,
            decoder=replace(decoder, blocks=decoder.blocks[:count], attentions=attentions),
        )
    finally:
        setattr(decoder.module, decoder.list_name, whole)


def _selects_keys(model: LoadedModel) -> bool:
    """Whether queries look at the keys alone that score best, as in DeepSeek-V3.2 and Doge.

    Which of equal scores are best depends on the number of keys, padding included. Few random
    tokens do not show it, because thousands of keys are selected.
    """
    modules = (module for block in model.blocks for module in block.modules())
    return any(
        "Indexer" in type(module).__name__ or hasattr(module, "keep_window_size")
        for module in modules
    )


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's settings, such as the width of its window."""
    for name, value in vars(module).items():
        if isinstance(value, bool | int | float | str | None) and name not in _INDICES:
            yield name, value


def random_tokens(model: LoadedModel, tokens: int) -> torch.Tensor:
    """Return ids ``(2, token)`` that are no special tokens, always the same ones."""
    config = model.model.config.get_text_config()
    vocabulary = int(config.vocab_size)
    special = {*model.special_ids, *_special_ids(model.model.config)}
    usual = torch.tensor([one not in special for one in range(vocabulary)]).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(0)
    tokens = min(tokens, model.max_tokens or tokens)
    ids = usual[torch.randint(0, len(usual), (2, tokens), generator=generator)]
    return ids.to(model.device)


def _special_ids(config: Any) -> set[int]:
    """Return the ids that a configuration names, such as that of an image's place."""
    return {
        value
        for name, value in vars(config).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }


# --- what is compared ---------------------------------------------------------------------------


# Layers and queries whose attention is computed by blocks of queries, as for Pass.
_Blocked = tuple[frozenset[int], tuple[int, ...] | None] | None


@dataclass
class _Observed:
    """A model's outputs for one prompt.

    Attributes
    ----------
    attention
        ``(head, query, key)`` by layer.
    queries
        By layer, the queries in the order in which they came.
    hidden
        ``(..., token, d)`` by layer: what the block returns.
    logprobs
        ``(token, vocabulary)``.
    """

    attention: dict[int, torch.Tensor] = field(default_factory=dict)
    queries: dict[int, list[int]] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    logprobs: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def drop_attention(self, layers: Iterable[int]) -> None:
        """Forget the attention of some layers."""
        for layer in layers:
            del self.attention[layer], self.queries[layer]


def _observe(
    model: LoadedModel,
    ids: Sequence[torch.Tensor],
    limits: CaptureLimits = DEFAULT_CAPTURE_LIMITS,
    blocked: _Blocked = None,
) -> list[_Observed]:
    """Let prompts ``(1, token)`` go through the model together, and keep what it makes of each."""
    lengths = [one.shape[1] for one in ids]
    padded = ids[0].new_zeros((len(ids), max(lengths)))
    mask = torch.zeros_like(padded)
    for row, one in enumerate(ids):
        padded[row, : lengths[row]] = one
        mask[row, : lengths[row]] = 1
    kinds = dict.fromkeys(range(len(model.blocks)), frozenset({"resid_post"}))
    steps: list[Any] = []
    model = replace(model, limits=limits)
    with taps(model, attention=True, kinds=kinds):
        running = Pass(model, padded, mask, blocked=blocked)
        try:
            while not running.dead:
                with torch.inference_mode():
                    step = running.advance()
                steps += [step] if isinstance(step, AttentionRows | BlockState | Logits) else []
        finally:
            running.stop()
    ran = sum(isinstance(step, BlockState) for step in steps)
    if ran != len(model.blocks):
        raise _refused(model, f"{ran} of {len(model.blocks)} blocks run.")
    return [_of_sequence(steps, row, length) for row, length in enumerate(lengths)]


def _of_sequence(steps: Sequence[Any], row: int, tokens: int) -> _Observed:
    observed, logits = _Observed(), []
    for step in steps:
        if isinstance(step, AttentionRows):
            rows = step.weights.new_zeros((step.weights.shape[0], len(step.queries), tokens))
            rows[..., : step.weights.shape[-1]] = step.weights
            before = observed.attention.get(step.layer, rows[:, :0])
            observed.attention[step.layer] = torch.cat([before, rows], dim=1)
            observed.queries.setdefault(step.layer, []).extend(step.queries)
        elif isinstance(step, BlockState):
            observed.hidden[step.layer] = step.hooks["resid_post"][..., row, :tokens, :]
            if step.attention is not None:
                observed.attention[step.layer] = step.attention[row]
                observed.queries[step.layer] = list(range(tokens))
        else:
            logits.append(step.values[row, : max(0, tokens - step.start)])
    observed.logprobs = torch.cat(logits).float().log_softmax(-1)
    return observed


class _Comparison:
    """Whether a way to compute gives what the plain one gives, within rounding.

    Parameters
    ----------
    model, plain
        A model, and what it makes of a prompt.
    noise
        The same of the prompt with every embedding changed by one rounding.
    """

    def __init__(self, model: LoadedModel, plain: _Observed, noise: _Observed) -> None:
        self._model = model
        self._noise = {
            key: distance(value, self._values(noise)[key])
            for key, value in self._values(plain).items()
        }

    def holds(
        self,
        expected: Sequence[tuple[_Observed, torch.Tensor]],
        limits: CaptureLimits = DEFAULT_CAPTURE_LIMITS,
        blocked: _Blocked = None,
    ) -> bool:
        """Whether prompts that go through the model together give what is expected of each."""
        try:
            found = _observe(self._model, [ids for _, ids in expected], limits, blocked)
        except ModelError:
            return False
        queries = blocked[1] if blocked else None
        return all(
            self._same(one, other, ids.shape[1], queries)
            for one, (other, ids) in zip(found, expected, strict=True)
        )

    def equal(self, layer: int, found: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether two attention matrices of a layer are the same within rounding."""
        return found.shape == expected.shape and self._close(("attention", layer), found, expected)

    def _same(
        self, found: _Observed, plain: _Observed, tokens: int, queries: tuple[int, ...] | None
    ) -> bool:
        rows = list(queries or range(tokens))
        if found.queries != dict.fromkeys(self._model.attentions, rows):
            return False
        ours, expected = self._values(found), self._values(plain)
        for layer in self._model.attentions:
            key = "attention", layer
            ours[key] = ours[key][:, : len(rows), :tokens]
            expected[key] = expected[key][:, rows]
        return all(self._close(key, ours[key], value) for key, value in expected.items())

    def _close(self, key: tuple[str, int], found: torch.Tensor, expected: torch.Tensor) -> bool:
        return within_rounding(self._model, found, expected, self._noise[key])

    @staticmethod
    def _values(observed: _Observed) -> dict[tuple[str, int], torch.Tensor]:
        return {
            **{("attention", layer): one for layer, one in observed.attention.items()},
            **{("hidden", layer): one for layer, one in observed.hidden.items()},
            ("logprobs", 0): observed.logprobs,
        }


# --- what is refused ----------------------------------------------------------------------------


def _without_matrix(model: LoadedModel, plain: _Observed) -> tuple[type[nn.Module], ...]:
    """Return the kinds of attention that give something else than rows of queries."""
    tokens = plain.logprobs.shape[0]
    kinds = {
        type(model.attentions[layer])
        for layer, weights in plain.attention.items()
        if weights.shape[1] != tokens
    }
    return tuple(kinds)


def _restricted(model: LoadedModel, without: tuple[type[nn.Module], ...]) -> LoadedModel:
    """Return the model without attention of some kinds."""
    decoder = model.decoder
    attentions = {
        layer: one
        for layer, one in decoder.attentions.items()
        if not isinstance(one.module, without)
    }
    return replace(model, decoder=replace(decoder, attentions=attentions))


def _check_matrices(model: LoadedModel, plain: _Observed) -> None:
    """Refuse attention that is not causal, or not from each token to each."""
    tokens = plain.logprobs.shape[0]
    if not plain.attention:
        raise _refused(model, "None of its blocks gives a matrix of attention probabilities.")
    for layer, weights in plain.attention.items():
        heads, _, keys = weights.shape
        if keys != tokens:
            raise _refused(
                model,
                f"Attention of layer {layer} has {keys} keys for {tokens} tokens: it attends to "
                "something else than the tokens, such as compressed ones.",
            )
        if heads != model.n_heads:
            raise _refused(
                model,
                f"Attention of layer {layer} has {heads} heads, the model's configuration says "
                f"{model.n_heads}.",
            )
        if (weights.triu(1).abs() > 0).any():
            raise _refused(
                model,
                f"Attention of layer {layer} looks at tokens behind its query, as encoders do: "
                "what the model says of a next token has seen it.",
            )


def _check_recorded(
    model: LoadedModel,
    plain: _Observed,
    recorded: Sequence[torch.Tensor],
    same: _Comparison,
) -> None:
    """Refuse attention that is not transformers' own ``output_attentions``."""
    layers = sorted(plain.attention)
    if len(recorded) != len(layers):
        raise _refused(
            model,
            f"transformers gives {len(recorded)} attention matrices (output_attentions), and "
            f"{len(layers)} of these {len(model.blocks)} blocks have attention.",
        )
    for layer, weights in zip(layers, recorded, strict=True):
        if not same.equal(layer, plain.attention[layer], weights[0]):
            raise _refused(
                model,
                f"Attention of layer {layer} is not the matrix that transformers gives for it "
                "(output_attentions).",
            )


def _recorded(model: LoadedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return transformers' own attention matrices."""
    mark = "_output_capturing_hooks_installed"
    before = [
        (module, dict(module._forward_hooks), mark in vars(module))  # noqa: SLF001
        for module in model.model.modules()
    ]
    with torch.inference_mode(), forward_errors(model.attributes.id):
        output = model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            output_attentions=True,
        )
    for module, hooks, had_mark in before:
        # Masks that transformers puts on blocks, and says to have put on all.
        for key in set(module._forward_hooks) - set(hooks):  # noqa: SLF001
            del module._forward_hooks[key]  # noqa: SLF001
        if not had_mark:
            vars(module).pop(mark, None)
    found = getattr(output, "attentions", None) or ()
    return [
        one for one in found if getattr(one, "ndim", None) == 4 and one.shape[2] == ids.shape[1]
    ]


def _refused(model: LoadedModel, why: str) -> ModelError:
    return not_exact(model.attributes.id, model.model, why)
