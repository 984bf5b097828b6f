"""Long prompts: nothing as large as a whole matrix is ever made, and work grows as the square."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import architectures
import numerics
import pytest
import rounding
import xarray as xr
from architectures import Activations, Models
from capturing import extract_within, interrupted_after, records_of
from sae_lens import SAE, StandardSAEConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from zarrtrace import machine
from zarrtrace.capture import CaptureLimits, LoadedModel
from zarrtrace.errors import IncompleteError
from zarrtrace.extraction import Options, estimate, extract_run, prepare
from zarrtrace.format.layout import Limits
from zarrtrace.store import open_trace, verify

pytestmark = pytest.mark.torch

TOKENS = 400
#: Layers are cut into as many records and files as can be.
CUT = CaptureLimits(layout=Limits(file_bytes=1, record_bytes=1), logit_rows=64)
SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "long_prompts.py"


#: Blocks, records and pieces of logits as small against 400 tokens as they are in truth.
LIMITS = CaptureLimits(
    layout=Limits(record_bytes=4 * 4 * TOKENS * 64),
    block_bytes=4 * 4 * TOKENS * 16,
    logit_rows=64,
)


def in_parts(model: LoadedModel) -> LoadedModel:
    return replace(model, limits=LIMITS)


class Largest(TorchDispatchMode):
    """Record the most elements that any operator's result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            stored = getattr(tensor, "untyped_storage", None)
            if stored is not None:  # of a view, what it looks at; expanded dimensions are free
                self.elements = max(self.elements, stored().nbytes() // tensor.element_size())
        return out


def _largest(models: Models, name: str, **options: Any) -> int:
    """Return the largest result, in elements, and the largest record of a capture."""
    request = architectures.request(architectures.random_ids(TOKENS), **options)
    largest = Largest()
    with largest:
        for record in records_of(in_parts(models(name)), [request], attention_dtype="float32"):
            attention = getattr(record, "attention", None)
            if attention is not None:
                largest.elements = max(largest.elements, attention.size)
    return largest.elements


@pytest.mark.parametrize("queries", [None, (0, 200, 399)])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 2", "gpt-oss"])
def test_no_whole_matrix_is_ever_made(
    models: Models, name: str, queries: tuple[int, ...] | None
) -> None:
    whole = 4 * TOKENS**2
    assert _largest(models, name) >= whole  # or this test could not fail
    assert _largest(models, name, blocked=True, attention_positions=queries) <= whole // 4


@pytest.mark.long
@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_work_grows_as_the_square_and_no_worse(models: Models, name: str) -> None:
    flops = []
    for tokens in (200, 400, 800):
        request = architectures.request(architectures.random_ids(tokens), blocked=True)
        with FlopCounterMode(display=False) as counter:
            list(records_of(in_parts(models(name)), [request], attention_dtype="float32"))
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] <= 4
    assert flops[2] / flops[1] <= 4


def test_blocks_do_no_more_work_than_whole_matrices(models: Models) -> None:
    """Keys behind a block's last query are left out: about half the work of attention."""
    counted = []
    for way in (False, True):
        request = architectures.request(architectures.random_ids(TOKENS), blocked=way)
        with FlopCounterMode(display=False) as counter:
            list(records_of(in_parts(models("Llama")), [request], attention_dtype="float32"))
        counted.append(counter.get_total_flops())
    assert counted[1] < counted[0]


def _suite(folder: Path) -> Path:
    file = folder / "suite.yaml"
    prompt = "Last spins: lost $30, lost $60. You now hold $140, and the goal is $200. " * 8
    file.write_text(json.dumps({"scenarios": [{"name": "long", "prompt": prompt.strip()}]}))
    return file


def _options(models: Models, folder: Path, **changes: Any) -> Options:
    for layer in (1, 2):
        config = StandardSAEConfig(d_in=32, d_sae=48)
        config.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        if not (folder / "saes" / str(layer)).exists():
            SAE.from_dict(config.to_dict()).save_model(folder / "saes" / str(layer))
    return Options(
        model=str(models.path("Llama")),
        layers=(1, 2),
        sae_path=folder / "saes",
        scenarios=_suite(folder),
        residual=True,
        **changes,
    )


def _deviations(models: Models, ds: xr.Dataset) -> dict[str, float]:
    """Return how far rounding may bring two runs over a trace's prompt apart."""
    ids = tuple(ds.token_id.values.tolist())
    found = numerics.whole_model_deviations("Llama", models.path("Llama"), ids)
    return {
        "attention": found["attention"],
        "attention_mean": found["attention"],
        "blocks": found["blocks"],
        "next_token_logprob": found["logprob"],
    }


def _assert_features_close(
    found: xr.Dataset, expected: xr.Dataset, options: Options, models: Models
) -> None:
    allowed = _deviations(models, expected)
    blocks = architectures.reference(
        "Llama", models.path("Llama"), expected.token_id.values.tolist()
    ).blocks
    for layer in expected.layer.values.tolist():
        sae = SAE.load_from_disk(Path(str(options.sae_path)) / str(layer))
        one, other = (ds.features.sel(layer=layer).values for ds in (expected, found))
        size = float(blocks[layer].abs().max())
        numerics.assert_features_close(one, other, sae, allowed["blocks"], size)


def test_layers_in_several_records_are_the_same_layers(models: Models, tmp_path: Path) -> None:
    options = _options(models, tmp_path)
    whole = open_trace(extract_run(tmp_path / "whole", options) / "long")
    blocks = _options(models, tmp_path, attention_capture="blocked")
    run = extract_within(CUT, tmp_path / "rows", blocks)
    assert verify(run) == []
    rows = open_trace(run / "long")
    assert len(list((tmp_path / "rows" / "long" / "features").glob("c.0.*"))) > 3
    allowed = _deviations(models, whole)
    for name in ("attention", "attention_mean", "next_token_logprob"):
        rounding.assert_close(rows[name], whole[name], allowed[name])
    _assert_features_close(rows, whole, options, models)
    rounding.assert_same_ranking(
        rows.next_token.values,
        whole.next_token.values,
        whole.next_token_logprob.values,
        allowed["next_token_logprob"],
    )


def test_a_run_stopped_between_two_records_of_a_layer_goes_on(
    models: Models, tmp_path: Path
) -> None:
    options = _options(models, tmp_path, attention_capture="blocked")
    expected = open_trace(extract_within(CUT, tmp_path / "expected", options) / "long")
    with interrupted_after(3):
        extract_within(CUT, tmp_path / "run", options)
    with pytest.raises(IncompleteError, match="not complete"):
        open_trace(tmp_path / "run" / "long")
    run = extract_within(CUT, tmp_path / "run", options)
    assert verify(run) == []
    xr.testing.assert_identical(open_trace(run / "long").drop_attrs(), expected.drop_attrs())


def test_features_of_long_prompts_come_from_blocks_too(models: Models, tmp_path: Path) -> None:
    """Without attention to store, eager attention would still make its whole matrices."""
    options = _options(models, tmp_path, attention=False)
    whole = open_trace(extract_run(tmp_path / "whole", options) / "long")
    limits = CaptureLimits(whole_bytes=1000)
    found = open_trace(extract_within(limits, tmp_path / "blocks", options) / "long")
    implementations = [ds.attrs["model"]["attn_implementation"] for ds in (whole, found)]
    assert implementations == ["eager", "blocked"]
    _assert_features_close(found, whole, options, models)


def test_features_alone_need_no_attention_matrix(models: Models) -> None:
    source = Activations()
    request = architectures.request(architectures.random_ids(TOKENS), blocked=True)
    largest = Largest()
    with largest:
        records = list(
            records_of(
                in_parts(models("Llama")),
                [request],
                attention_dtype=None,
                saes=source.find(range(4)),
                source=source,
            )
        )
    assert all(getattr(record, "attention", None) is None for record in records)
    assert largest.elements <= TOKENS**2


def test_freed_memory_is_given_back_where_the_c_library_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NoSuchFunction:
        pass

    machine.release_freed()
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _name: NoSuchFunction())
    machine._malloc_trim.cache_clear()
    machine.release_freed()
    assert machine._malloc_trim() is None
    machine._malloc_trim.cache_clear()


# --- the benchmark ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    loader = importlib.util.spec_from_file_location("long_prompts", SCRIPT)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # where `common` is
        loader.loader.exec_module(module)
    return module


@pytest.mark.parametrize("way", ["whole", "blocked", "last"])
def test_the_benchmark_measures_every_way(bench: ModuleType, tmp_path: Path, way: str) -> None:
    bench.make_model(tmp_path / "model")
    found = bench.measure(way, 300, tmp_path)
    assert found["seconds"] > 0
    assert found["baseline_bytes"] > 0
    if way == "whole":
        assert found["result_bytes"] == 4 * 4 * 4 * 300**2
    else:
        ds = open_trace(tmp_path / f"{way}300" / "long")
        assert ds.sizes["query"] == 300
        assert ds.attrs["model"]["attn_implementation"] == "blocked"


def test_expected_memory_of_long_prompts_does_not_grow_as_the_square(
    bench: ModuleType, tmp_path: Path
) -> None:
    bench.make_model(tmp_path / "model")

    def expected(way: str, tokens: int) -> int:
        options = bench.make_options(way, tokens, tmp_path)
        return estimate(prepare(options, weights=False)).host_bytes

    def growth(way: str) -> float:
        return expected(way, 8192) / expected(way, 4096)

    assert growth("whole") > 2.5  # or this test could not fail
    assert growth("blocked") < 1.2
    assert growth("last") < 1.2


@pytest.mark.long
@pytest.mark.parametrize("way", ["blocked", "last"])
def test_expected_memory_is_what_a_process_takes(
    bench: ModuleType, tmp_path: Path, way: str
) -> None:
    bench.make_model(tmp_path / "model")
    found = bench.in_process(way, 3000, tmp_path)
    taken = found["baseline_bytes"] + found["beyond_bytes"]
    # Libraries take different amounts on other machines; too little would mislead.
    assert taken <= found["expected_bytes"] <= 3 * taken


def test_the_benchmark_lets_figures_grow_as_the_square(bench: ModuleType) -> None:
    row = {"seconds": 1.0, "baseline_bytes": 5, "beyond_bytes": 10, "result_bytes": 100}
    found = bench.extrapolated({100: row}, 300)
    assert found["beyond_bytes"] == 90
    assert found["baseline_bytes"] == 5
    assert bench.extrapolated({100: row, 300: found}, 500)["beyond_bytes"] == 250
