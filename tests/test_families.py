"""Families of causal language models against transformers' own eager attention."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import architectures
import families
import numpy as np
import pytest
import torch
from architectures import Activations, Reference
from capturing import records_of
from everyday import mostly_long
from families import FAMILIES, REFUSALS
from transformers import AutoTokenizer, LlamaConfig, LlavaConfig

import zarrtrace as zt
from zarrtrace.capture import CaptureLimits, Request, blocked
from zarrtrace.capture.rope import rope_limits, rope_sides
from zarrtrace.errors import ModelError
from zarrtrace.extraction import Options
from zarrtrace.extraction.job import Job, prepare, with_scenarios
from zarrtrace.records import LayerRecord, TokensRecord
from zarrtrace.scenarios import Scenario

pytestmark = pytest.mark.torch

#: Of the most different kinds; the others take minutes.
_EVERY_DAY = (
    "bert", "deepseek_v32", "deepseek_v4", "gemma3", "gptj", "llama4_text", "mamba", "minimax",
)  # fmt: skip


def _parameters(names: Iterable[str], *others: Iterable[str]) -> list[Any]:
    """Return tests' parameters, marked long for most families."""
    return mostly_long(lambda name, *_: name in _EVERY_DAY, names, *others)


CAPTURED = [name for name, family in FAMILIES.items() if family.refused is None]
REFUSED = [name for name, family in FAMILIES.items() if family.refused is not None]

_SENTENCE = "Round {}: you bet ${} and lost; you now hold ${}, and the goal is $200. "
PROMPTS = {
    "short": "You now hold $90. Your choice:",
    "longer": _SENTENCE.format(3, 20, 140) + "Bet or stop?",
    "long": "".join(_SENTENCE.format(at, 7 * at % 90, 200 - 3 * at) for at in range(18)),
}
#: Ways to capture, and the prompts that are captured in each.
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "alone": ({}, ("longer",)),
    "together": ({"batch_size": 2}, ("short", "longer")),
    "by blocks": ({"attention_capture": "blocked"}, ("longer",)),
    "long": ({}, ("long",)),
}
# A score is a sum of WIDTH products and about 10 in size, so that its rounding, which shifts a
# probability by as much, is at most WIDTH * 10 eps; LAYERS blocks add theirs.
ATTENTION_TOLERANCE = 2**-23 * families.WIDTH * families.LAYERS * 10
LOGPROB_TOLERANCE = 10 * ATTENTION_TOLERANCE


class Models:
    """Saved models; the last one stays loaded, by zarrtrace and by transformers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._job: Job | None = None
        self._eager: Any = None
        self._made: dict[tuple[int, ...], Reference] = {}

    def path(self, name: str) -> Path:
        """Return the folder of a family's model."""
        path = self._folder / name
        if not path.is_dir():
            architectures.save_random(families.make_config(name), path)
        if name != self._name:
            self._name, self._job, self._eager, self._made = name, None, None, {}
        return path

    def job(self, name: str) -> Job:
        """Return a job of a family's model."""
        path = self.path(name)
        if self._job is None:
            self._job = _prepare(path)
        return self._job

    def reference(self, name: str, ids: Sequence[int]) -> Reference:
        """Return what transformers makes of a prompt."""
        path, family, key = self.path(name), FAMILIES[name], tuple(ids)
        if self._eager is None:
            self._eager = architectures.load_eager(path)
        if key not in self._made:
            blocks = len(self._eager.get_submodule(family.blocks))
            layers = range(blocks) if family.attention is None else family.attention
            self._made[key] = architectures.reference_of(self._eager, family.blocks, layers, ids)
        return self._made[key]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("families"))


class Captured(NamedTuple):
    """Records of one prompt."""

    attention: Mapping[int, np.ndarray]
    mean: Mapping[int, np.ndarray]
    blocks: Mapping[int, np.ndarray]
    tokens: TokensRecord


def _prepare(path: Path) -> Job:
    """Load and examine a model, as a run does; blocks of queries are small."""
    return prepare(
        Options(model=str(path), features=False),
        scenarios=[Scenario(PROMPTS["short"], name="short", marks=False)],
        limits=CaptureLimits(block_bytes=1, block_rows=7),
    )


def _in_way(job: Job, way: str) -> Job:
    """Return the job for a way's prompts and options."""
    options, prompts = WAYS[way]
    return with_scenarios(
        replace(job, options=replace(job.options, **options)),
        [Scenario(PROMPTS[name], name=name, marks=False) for name in prompts],
    )


def _capture(job: Job, *, vectors: bool) -> dict[str, Captured]:
    """Capture all that a job asks for, and the residual stream behind each block."""
    layers = range(len(job.model.blocks))
    source = Activations(width=job.model.d_model)
    requests = [
        Request(
            prompt,
            frozenset(layers),
            next_token=True,
            blocked=prompt.scenario.name in job.blocked,
        )
        for prompt in job.prompts
    ]
    records = records_of(
        job.model,
        requests,
        attention_dtype="float32",
        batch_size=job.batch_size,
        **({"saes": source.find(layers), "source": source} if vectors else {}),
    )
    by_scenario: dict[str, list[Any]] = {}
    for record in records:
        by_scenario.setdefault(record.scenario, []).append(record)
    return {name: _put_together(found) for name, found in by_scenario.items()}


def _put_together(records: Sequence[Any]) -> Captured:
    arrays: dict[str, dict[int, list[np.ndarray]]] = {"attention": {}, "mean": {}, "blocks": {}}
    for record in records:
        if not isinstance(record, LayerRecord):
            continue
        if record.attention is not None:
            arrays["attention"].setdefault(record.layer, []).append(np.asarray(record.attention))
            arrays["mean"].setdefault(record.layer, []).append(np.asarray(record.attention_mean))
        for found in record.features.values():
            arrays["blocks"].setdefault(record.layer, []).append(np.asarray(found.activations))
    axes = {"attention": 1, "mean": 0, "blocks": 0}
    whole = {
        array: {layer: np.concatenate(rows, axes[array]) for layer, rows in found.items()}
        for array, found in arrays.items()
    }
    (tokens,) = (record for record in records if isinstance(record, TokensRecord))
    return Captured(whole["attention"], whole["mean"], whole["blocks"], tokens)


@pytest.fixture
def block_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the blocks of queries of each attention matrix."""
    counts: list[int] = []
    blocks = blocked._blocks

    def counted(*given: Any) -> Any:
        found = list(blocks(*given))
        counts.append(len(found))
        return iter(found)

    monkeypatch.setattr(blocked, "_blocks", counted)
    return counts


@pytest.mark.parametrize(("name", "way"), _parameters(CAPTURED, WAYS))
def test_families_are_captured_as_transformers_computes_them(
    models: Models, block_counts: list[int], name: str, way: str
) -> None:
    family, job = FAMILIES[name], _in_way(models.job(name), way)
    block_counts.clear()  # those of a probe
    captured = _capture(job, vectors=family.vectors)
    assert list(captured) == list(WAYS[way][1])
    if way == "together":
        assert job.batch_size == (2 if family.together else 1)
    if way == "by blocks":
        assert bool(job.blocked) == family.by_blocks
        assert min(block_counts, default=0) >= (3 if family.by_blocks else 0)
    for prompt in job.prompts:
        ids = prompt.tokens.ids
        assert len(ids) > 512 or way != "long"
        expected, found = models.reference(name, ids), captured[prompt.scenario.name]
        # As transformers' own where the same is computed in the same shapes.
        plain = not job.blocked and job.batch_size == 1
        _compare(found, expected, vectors=family.vectors, atol=0 if plain else None)


def _compare(found: Captured, expected: Reference, *, vectors: bool, atol: float | None) -> None:
    tolerance = ATTENTION_TOLERANCE if atol is None else atol
    assert list(found.attention) == list(expected.attention)
    for layer, weights in expected.attention.items():
        whole = weights.numpy()
        assert found.attention[layer].shape == whole.shape
        np.testing.assert_allclose(found.attention[layer], whole, rtol=0, atol=tolerance)
        mean = weights.double().mean(0).numpy()
        np.testing.assert_allclose(
            found.mean[layer], mean, rtol=0, atol=tolerance + 2**-23 * families.HEADS
        )
    if vectors:
        assert list(found.blocks) == list(expected.blocks)
        for layer, block in expected.blocks.items():
            size = float(block.abs().max())
            np.testing.assert_allclose(
                found.blocks[layer], block.numpy(), rtol=0, atol=tolerance * max(size, 1)
            )
    logprobs = expected.logits.float().log_softmax(-1)
    best = torch.from_numpy(found.tokens.next_token.astype(np.int64))
    stored = found.tokens.next_token_logprob
    for own in (logprobs.gather(1, best), logprobs.topk(best.shape[1]).values):
        np.testing.assert_allclose(stored, own.numpy(), rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("name", _parameters(REFUSED))
def test_families_without_token_attention_are_refused(models: Models, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        _prepare(models.path(name))
    reason = FAMILIES[name].refused
    assert reason is not None
    assert re.search(REFUSALS[reason], str(caught.value))


@pytest.mark.parametrize(
    "name", _parameters(name for name in CAPTURED if not FAMILIES[name].vectors)
)
def test_saes_on_blocks_that_pass_on_several_vectors_are_refused(models: Models, name: str) -> None:
    job = _in_way(models.job(name), "alone")
    with pytest.raises(ModelError, match="one vector a token"):
        _capture(job, vectors=True)


# --- rotary embeddings that depend on the length of a pass ---------------------------------------


def _of_lengths(tokenizer: Any, lengths: Iterable[int]) -> list[Scenario]:
    """Return prompts of some numbers of tokens, BOS included, named by them."""
    text = PROMPTS["long"]
    ends = {len(tokenizer(text[:end])["input_ids"]): end for end in range(1, 600)}
    return [Scenario(text[: ends[n]], name=f"s{n}", marks=False) for n in lengths]


@pytest.mark.parametrize("way", ["together", "by blocks", "from host memory"])
@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_short_and_long_prompts_have_their_own_rope_factors(
    tmp_path: Path, model_type: str, way: str
) -> None:
    """On both sides of the limit of 64 tokens, where the factors change for a whole pass."""
    path = architectures.save_random(architectures.longrope_config(model_type), tmp_path / "model")
    tokenizer, eager = AutoTokenizer.from_pretrained(path), architectures.load_eager(path)
    options: dict[str, Any] = {
        "together": {"batch_size": 3},
        "by blocks": {"attention_capture": "blocked"},
        "from host memory": {"batch_size": 3, "low_memory": True},
    }[way]
    run = zt.extract(
        tmp_path / "run", _of_lengths(tokenizer, (90, 24, 64, 65, 63, 30)), model=path,
        tokenizer=tokenizer, features=False, residual=True, quiet=True, **options,
    )  # fmt: skip
    assert sorted(run.children) == ["s24", "s30", "s63", "s64", "s65", "s90"]
    for name, node in run.children.items():
        ds = node.to_dataset()
        ids = ds.token_id.values.tolist()
        assert name == f"s{len(ids)}"
        expected = architectures.reference_of(eager, "model.layers", range(4), ids)
        for layer, weights in expected.attention.items():
            found = ds.attention.sel(layer=layer)
            np.testing.assert_allclose(found, weights, atol=ATTENTION_TOLERANCE, rtol=0)
        logprobs = expected.logits.log_softmax(-1).topk(10).values
        np.testing.assert_allclose(ds.next_token_logprob, logprobs, atol=LOGPROB_TOLERANCE)


def test_a_table_has_each_prompts_own_rope_factors(tmp_path: Path) -> None:
    path = architectures.save_random(architectures.longrope_config("phi3"), tmp_path / "model")
    tokenizer, eager = AutoTokenizer.from_pretrained(path), architectures.load_eager(path)
    table = zt.extract(
        tmp_path / "table", _of_lengths(tokenizer, (90, 24, 64, 65)), model=path, layout="table",
        tokenizer=tokenizer, features=False, residual=True, quiet=True,
    )  # fmt: skip
    for name in ("s90", "s24", "s64", "s65"):
        ds = table.isel(sample=table.scenario.values == name)
        ids = ds.token_id.values.tolist()
        assert name == f"s{len(ids)}"
        expected = architectures.reference_of(eager, "model.layers", range(4), ids)
        for layer, hidden in expected.blocks.items():
            found = ds.residual.sel(layer=layer)
            np.testing.assert_allclose(found, hidden, rtol=1e-4, atol=1e-4)


def test_lengths_at_which_rope_factors_change() -> None:
    def limits(config: Any, longest: int | None = 1024) -> list[int]:
        return rope_limits(
            SimpleNamespace(model=SimpleNamespace(config=config), max_tokens=longest)
        )

    phi = architectures.longrope_config("phi3")
    assert limits(phi) == [64]
    assert limits(phi, 65) == [64]
    assert limits(phi, None) == [64]
    assert limits(phi, 64) == []  # no prompt is longer
    assert limits(LlamaConfig()) == []
    text = architectures.longrope_config("llama").to_dict()
    assert limits(LlavaConfig(text_config=text)) == [64]
    nested = LlamaConfig(layer_types=["sliding_attention", "full_attention"] * 16)
    nested.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": dict(phi.rope_parameters),
    }
    assert limits(nested) == [64]
    model: Any = SimpleNamespace(model=SimpleNamespace(config=phi), max_tokens=1024)
    assert rope_sides(model, (1, 64, 65, 1024)) == [0, 0, 1, 1]
