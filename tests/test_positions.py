"""Runs of chosen token positions, against transformers, SAEs, full runs and other readers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import fakes
import numerics
import numpy as np
import pytest
import rounding
import tensorstore
import torch
import xarray as xr
from architectures import Activations, Models
from capturing import extract_within, interrupted_after, records_of
from everyday import mostly_long
from sae_lens import SAE

import zarrtrace as zt
from zarrtrace import analysis, demo, figures
from zarrtrace.capture import CaptureLimits
from zarrtrace.errors import ConfigError, ConfigMismatchError, IntegrityError, ScenarioError
from zarrtrace.extraction import Options, estimate, extract_run, prepare
from zarrtrace.format.layout import Limits
from zarrtrace.index import build_index, find_feature
from zarrtrace.npz import export_npz
from zarrtrace.records import LayerRecord, TokensRecord
from zarrtrace.scenarios.positions import parse_positions
from zarrtrace.store import open_trace, verify
from zarrtrace.viewer.arrays import trace_arrays

pytestmark = pytest.mark.torch

NAMES = ("Risky_40", "Medium_60")
LAYERS = (3, 20)
SMALL: dict[str, Any] = {"layers": LAYERS, "only": NAMES, "residual": True}
#: What is asked for, and the positions in a prompt of 117 tokens with its spans.
ASKED: dict[str, Any] = {
    "last": "last",
    "spans": "spans",
    "names": ("balance", "decision"),
    "integers": (0, 5, -1),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of all positions, and runs of chosen ones."""
    folder = tmp_path_factory.mktemp("runs")
    for name, positions in {"all": "all", **ASKED}.items():
        extract_run(folder / name, Options(**SMALL, positions=positions))
    rows: dict[str, Any] = {"positions": "spans", "attention_positions": "last"}
    extract_run(folder / "rows", Options(**SMALL, **rows))
    return {path.name: path for path in folder.iterdir()}


def _expected(asked: str, ds: xr.Dataset) -> list[int]:
    tokens = ds.sizes["key"]
    spans = {name: found["tokens"] for name, found in ds.attrs["spans"].items()}
    return {
        "all": list(range(tokens)),
        "last": [tokens - 1],
        "spans": sorted({at for found in spans.values() for at in found}),
        "names": sorted({*spans["balance"], tokens - 1}),
        "integers": [0, 5, tokens - 1],
    }[asked]


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", list(ASKED))
def test_chosen_rows_are_those_of_all(runs: dict[str, Path], asked: str) -> None:
    """Attention and residual bit for bit; SAEs and the head take fewer rows, which may round."""
    assert verify(runs[asked]) == []
    for name in NAMES:
        ds, whole = open_trace(runs[asked] / name), open_trace(runs["all"] / name)
        rows = ds["query"].values.tolist()
        assert rows == _expected(asked, ds)
        expected = whole.sel(query=rows)
        for exact in ("attention", "attention_mean", "residual", "query_token"):
            np.testing.assert_array_equal(ds[exact], expected[exact])
        for same in ("key", "token_id", "key_token", "special"):
            np.testing.assert_array_equal(ds[same], whole[same])
        scale = np.abs(whole.residual).max("channel").sel(query=rows).max() + 1
        error = rounding.product("float32", ds.sizes["channel"], float(scale) * 8)
        for rounded in ("features", "next_token_logprob"):
            rounding.assert_close(ds[rounded], expected[rounded], 4 * error)
        rounding.assert_same_ranking(
            ds.next_token.values,
            expected.next_token.values,
            expected.next_token_logprob.values,
            8 * float(error),
        )
        absent = min(set(range(ds.sizes["key"])) - set(rows))
        for array in ("attention", "features", "residual", "next_token"):
            with pytest.raises(KeyError):
                ds[array].sel(query=absent)


@pytest.mark.parametrize("asked", ["last", "spans"])
def test_saes_encode_the_stored_rows_to_the_features(runs: dict[str, Path], asked: str) -> None:
    ds = xr.open_zarr(runs[asked] / NAMES[0])
    for layer in LAYERS:
        sae = SAE.load_from_disk(demo.sae_path() / f"blocks.{layer}.hook_resid_post")
        with torch.no_grad():
            encoded = sae.encode(torch.from_numpy(ds.residual.sel(layer=layer).values)).numpy()
        np.testing.assert_array_equal(ds.features.sel(layer=layer), encoded)


def test_attention_alone_has_fewer_rows(runs: dict[str, Path]) -> None:
    ds, whole = open_trace(runs["rows"] / NAMES[0]), open_trace(runs["all"] / NAMES[0])
    assert ds.attention.dims == ("layer", "head", "attention_query", "key")
    assert ds["query"].values.tolist() == _expected("spans", ds)
    assert ds.attention_query.values.tolist() == [ds.sizes["key"] - 1]
    np.testing.assert_array_equal(ds.attention[..., 0, :], whole.attention[..., -1, :])
    with pytest.raises(KeyError):
        ds.attention.sel(attention_query=0)


@pytest.mark.parametrize(
    ("name", "way"),
    mostly_long(
        lambda name, way: name == "Llama" or way == "blocked",
        ["Llama", "GPT-2", "Gemma 2", "gpt-oss", "Qwen3-Next"],
        ["one by one", "in a batch", "in parts", "blocked"],
    ),
)
def test_captured_rows_are_transformers_own(models: Models, name: str, way: str) -> None:
    lengths = {"a": 9, "b": 31, "c": 17}
    chosen = {"a": (0, 8), "b": (3, 4, 7, 11, 12, 29), "c": (16,)}
    limits = CaptureLimits(
        layout=Limits(file_bytes=1, record_bytes=1, tokens=2, features=16, queries=2),
        block_bytes=1,
        block_rows=7,
        logit_rows=2,
    )
    model = models(name)
    if way in ("in parts", "blocked"):
        model = replace(model, limits=limits)
    ids = {one: architectures.random_ids(length, length) for one, length in lengths.items()}
    source = Activations()
    records = list(
        records_of(
            model,
            [
                architectures.request(
                    ids[one], one, [1, 3], positions=chosen[one], blocked=way == "blocked"
                )
                for one in lengths
            ],
            attention_dtype="float32",
            saes=source.find([1, 3]),
            source=source,
            residual={layer: f"blocks.{layer}.hook_resid_post" for layer in (1, 3)},
            batch_size=3 if way == "in a batch" else 1,
        )
    )
    for one, rows in chosen.items():
        path = models.path(name)
        expected = architectures.reference(name, path, ids[one])
        error = numerics.whole_model_deviations(name, path, tuple(ids[one]))
        mine = [record for record in records if record.scenario == one]
        for layer in (1, 3):
            here = [r for r in mine if isinstance(r, LayerRecord) and r.layer == layer]
            residual = _joined(here, lambda record: record.residual)
            features = _joined(here, _activations)
            np.testing.assert_array_equal(residual, features)
            found = expected.blocks[layer][list(rows)]
            rounding.assert_close(residual, found.numpy(), error["blocks"])
            attention = _joined(here, lambda record: record.attention, axis=1)
            exact = expected.attention[layer][:, list(rows)]
            rounding.assert_close(attention, exact.numpy(), error["attention"])
        (tokens,) = (record for record in mine if isinstance(record, TokensRecord))
        assert tokens.next_token.shape == (len(rows), 10)
        logprobs = expected.logits[list(rows)].float().log_softmax(-1)
        best = logprobs.topk(10)
        rounding.assert_close(tokens.next_token_logprob, best.values.numpy(), error["logprob"])


def _activations(record: LayerRecord) -> Any:
    return record.features["features"].activations if record.features else None


def _joined(records: list[LayerRecord], of: Any, axis: int = 0) -> np.ndarray:
    """Put the parts of a layer together, in the order of their rows."""
    parts = [(record.start, of(record)) for record in records]
    having = [(start, np.asarray(part)) for start, part in parts if part is not None]
    assert [start for start, _ in having] == sorted(start for start, _ in having)
    return np.concatenate([part for _, part in having], axis=axis)


# --- runs ---------------------------------------------------------------------------------------

#: Layers are cut into as many records and files as can be.
CUT = CaptureLimits(layout=Limits(file_bytes=1, record_bytes=1, tokens=4, queries=4), logit_rows=3)


@pytest.mark.long
@pytest.mark.parametrize("records", [3, 9])
def test_an_interrupted_run_is_the_same_byte_for_byte(tmp_path: Path, records: int) -> None:
    options = Options(**{**SMALL, "only": NAMES[:1]}, positions="spans")
    expected = fakes.files_in(extract_within(CUT, tmp_path / "expected", options))
    with interrupted_after(records):
        extract_within(CUT, tmp_path / "run", options)
    assert fakes.files_in(extract_within(CUT, tmp_path / "run", options)) == expected
    whole = extract_within(CUT, tmp_path / "whole", Options(**{**SMALL, "only": NAMES[:1]}))
    ds = xr.open_zarr(tmp_path / "run" / NAMES[0])
    rows = xr.open_zarr(whole / NAMES[0]).sel(query=ds["query"].values)
    for name in ("attention", "attention_mean", "residual"):
        np.testing.assert_array_equal(ds[name], rows[name])


@pytest.mark.parametrize("changed", [{"positions": "last"}, {"attention_positions": "last"}])
def test_other_positions_are_another_run(runs: dict[str, Path], changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigMismatchError, match=next(iter(changed))):
        extract_run(runs["spans"], Options(**{**SMALL, "positions": "spans", **changed}))


@pytest.mark.parametrize("asked", ["last", "rows"])
def test_other_readers_read_them(runs: dict[str, Path], asked: str) -> None:
    folder = runs[asked] / NAMES[0]
    ours, plain = open_trace(folder), xr.open_zarr(folder, chunks=None)
    assert list(ours.indexes) == [name for name in ours.indexes if name in plain.indexes]
    for name, array in ours.variables.items():
        np.testing.assert_array_equal(array.values, plain[name].values)
        if array.dtype.kind != "O":
            store = {"driver": "file", "path": str(folder / str(name))}
            other = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
            np.testing.assert_array_equal(other.read().result(), array.values)


def test_a_dry_run_says_their_size(runs: dict[str, Path]) -> None:
    for asked, positions in {"all": "all", **ASKED}.items():
        needed = estimate(prepare(Options(**SMALL, positions=positions), weights=False))
        found = [open_trace(runs[asked] / name) for name in NAMES]
        dense = sum(one.nbytes for ds in found for one in ds.variables.values())
        assert needed.dense_bytes == pytest.approx(dense, rel=0.05)


# --- what is asked for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("all", "all"),
        ("spans", "spans"),
        ("goal, balance,goal", ("goal", "balance")),
        (["last"], ("last",)),
        ("0,5,-1", (0, 5, -1)),
        (7, (7,)),
        (np.array([1, 2]), (1, 2)),
    ],
)
def test_words_names_and_integers(given: Any, options: Any) -> None:
    assert parse_positions(given, "positions") == options


@pytest.mark.parametrize("given", ["", "goal,", [], 1.5, ["goal", 3], [True], None])
def test_other_things_are_no_positions(given: Any) -> None:
    with pytest.raises(ConfigError, match="positions"):
        parse_positions(given, "positions")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"positions": "balanc"}, ScenarioError, "no scenario has a span 'balanc'"),
        ({"positions": (117,)}, ConfigError, "--positions 117: scenario"),
        ({"positions": (-118, 0)}, ConfigError, "--positions -118"),
        (
            {"positions": "spans", "attention_positions": (0,)},
            ConfigError,
            "token 0 of scenario 'Risky_40' is not among the stored positions",
        ),
        (
            {"attention_positions": "last", "attention": False},
            ConfigError,
            "--attention-positions with --no-attention",
        ),
    ],
)
def test_positions_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as refused:
        zt.extract(tmp_path / "run", layers=3, scenario=NAMES, quiet=True, **options)
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_spans_that_some_scenarios_lack(tmp_path: Path) -> None:
    have = zt.Scenario("You hold $90 of $200.", name="have", spans={"goal": "$200"})
    lack = zt.Scenario("You hold $90.", name="lack", spans={"balance": "$90"})
    given: dict[str, Any] = {"model": "demo", "layers": 3, "quiet": True}
    with pytest.raises(ScenarioError, match="scenario 'lack' has none of these spans"):
        zt.extract(tmp_path / "none", [have, lack], positions="goal", **given)
    run = zt.extract(tmp_path / "run", [have, lack], positions="goal,decision", **given)
    goal = run["have"].to_dataset().zt.span("goal")
    assert run["have"]["query"].values.tolist() == [*goal, run["have"].sizes["key"] - 1]
    assert run["lack"]["query"].values.tolist() == [run["lack"].sizes["key"] - 1]


def test_damaged_positions_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["last"], tmp_path / "run"))
    file = run / NAMES[0] / "query/c.0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError):
        open_trace(run / NAMES[0])


# --- readers ------------------------------------------------------------------------------------


def test_analyses_take_what_is_stored_and_refuse_the_rest(runs: dict[str, Path]) -> None:
    last, spans, whole = (zt.open_run(runs[name]) for name in ("last", "spans", "all"))
    for run in (last, spans):
        found = analysis.attention_to(run, "balance")
        np.testing.assert_allclose(found, analysis.attention_to(whole, "balance"), rtol=1e-12)
        np.testing.assert_allclose(
            analysis.feature_trajectory(run, (20, 5), "decision"),
            analysis.feature_trajectory(whole, (20, 5), "decision"),
            rtol=1e-4,
            atol=1e-4,
        )
        np.testing.assert_allclose(
            analysis.decision(run).probability, analysis.decision(whole).probability, rtol=1e-4
        )
        assert analysis.word_associations(run).sizes["row"] > 0
    for refused in (
        lambda: analysis.attention_to(last, "balance", "balance"),
        lambda: analysis.attention_to(last, -1, 0),
        lambda: analysis.feature_trajectory(last, (20, 5), "balance"),
        lambda: analysis.pathway_features(last, "balance"),
        lambda: analysis.attention_flow(spans, "balance"),
        lambda: analysis.position_specific_features(last),
    ):
        with pytest.raises(ConfigError, match="is not stored"):
            refused()
    # Negative positions count from the end of the prompt, of which keys tell.
    np.testing.assert_array_equal(
        analysis.attention_to(last, -3, -1), analysis.attention_to(whole, -3, -1)
    )
    near = analysis.attention_locality(spans)
    assert set(near.dims) == set(analysis.attention_locality(whole).dims)
    np.testing.assert_array_equal(
        analysis.head_roles(last).sel(role="first_token"),
        np.stack([whole[name]["attention"].isel(query=-1, key=0) for name in NAMES]),
    )


def test_the_index_names_the_tokens_of_the_prompt(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["spans"], tmp_path / "run"))
    build_index(run)
    ds = open_trace(run / NAMES[0])
    strongest = ds.features.sel(layer=20).max("query")
    feature = int(np.argmax(strongest.values))
    use = find_feature(run, 20, feature)
    for token in use.tokens:
        trace = open_trace(run / token.scenario)
        stored = trace.features.sel(layer=20, feature=feature, query=token.position)
        assert token.activation == float(stored)
        assert token.token == str(trace.key_token.values[token.position])
    assert use.tokens


def test_figures_have_a_place_for_every_token(runs: dict[str, Path]) -> None:
    ds = open_trace(runs["spans"] / NAMES[0])
    (ax,) = figures.feature_timeline(ds).axes
    (image,) = ax.images
    drawn = np.ma.getmaskarray(image.get_array())
    assert drawn.shape == (len(LAYERS), ds.sizes["key"])
    assert np.flatnonzero(~drawn[0]).tolist() == ds["query"].values.tolist()
    shown = figures.attention_map(ds, 20).axes[0].images[0].get_array()
    assert shown.shape == (ds.sizes["key"], ds.sizes["key"])
    rows = np.flatnonzero(~np.ma.getmaskarray(shown).all(axis=1))
    assert rows.tolist() == ds["query"].values.tolist()


def test_the_viewer_has_a_row_for_every_token(runs: dict[str, Path]) -> None:
    for asked in ("last", "rows", "integers"):
        ds = open_trace(runs[asked] / NAMES[0])
        tokens = ds.sizes["key"]
        for array in trace_arrays(ds):
            at = array.dims.index("query")
            assert array.shape[at] == tokens
            values = np.moveaxis(array.load(tuple(slice(0, n) for n in array.shape)), at, 0)
            made_of = {"attention_to_spans": "attention", "residual_norm": "residual"}
            own = ds[made_of.get(array.name, array.name)]
            dim = "attention_query" if "attention_query" in own.dims else "query"
            rows = own[dim].values
            stored = np.moveaxis(own.values, own.dims.index(dim), 0)
            if array.name == "attention_to_spans":
                last = ds.zt.span("decision")
                np.testing.assert_array_equal(
                    values[rows][..., array.attributes["places"].index("decision")],
                    stored[..., last].sum(-1),
                )
            elif array.name == "residual_norm":
                squares = (stored.astype(np.float64) ** 2).sum(-1)
                np.testing.assert_allclose(values[rows] ** 2, squares, rtol=1e-6)
            else:
                np.testing.assert_array_equal(values[rows], stored)
            rest = np.delete(values, rows, axis=0)
            assert (np.isnan(rest) if rest.dtype.kind == "f" else rest == 2**32 - 1).all()


def test_the_npz_layout_has_no_place_for_some_tokens(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="features of 1 of 117 tokens"):
        export_npz(runs["last"], tmp_path / "npz")
    run = extract_run(
        tmp_path / "run",
        Options(**{**SMALL, "features": False, "residual": False}, positions="last"),
    )
    export_npz(run, tmp_path / "attention")
    whole = open_trace(runs["all"] / NAMES[0])
    with np.load(tmp_path / "attention" / NAMES[0] / "layer_20.npz") as file:
        np.testing.assert_array_equal(
            file["attention"][:, -1], whole.attention.sel(layer=20)[:, -1]
        )
        assert np.isnan(file["attention"][:, :-1]).all()


def test_what_another_library_captured(runs: dict[str, Path], tmp_path: Path) -> None:
    ds = open_trace(runs["all"] / NAMES[0])
    rows, few = [50, 51, 116], [116]
    ids, texts = ds.token_id.values.tolist(), [str(one) for one in ds.key_token.values]

    def of(name: str, at: list[int]) -> dict[int, np.ndarray]:
        return {layer: ds[name].sel(layer=layer, query=at).values for layer in LAYERS}

    given: dict[str, Any] = {
        "tokens": (ids, texts),
        "features": of("features", rows),
        "residual": of("residual", rows),
    }
    zt.write_trace(
        tmp_path / "run", "same", **given, attention=of("attention", rows), positions=rows
    )
    zt.write_trace(
        tmp_path / "fewer",
        "fewer",
        **given,
        attention=of("attention", few),
        positions=rows,
        attention_positions=few,
    )
    for name, dim, at in (("run/same", "query", rows), ("fewer/fewer", "attention_query", few)):
        stored = xr.open_zarr(tmp_path / name)
        assert stored["query"].values.tolist() == rows
        assert stored.attention[dim].values.tolist() == at
        assert stored.query_token.values.tolist() == [texts[one] for one in rows]
        np.testing.assert_array_equal(stored.features, ds.features.sel(query=rows))
        np.testing.assert_array_equal(stored.residual, ds.residual.sel(query=rows))
        np.testing.assert_array_equal(stored.attention, ds.attention.sel(query=at))
    with pytest.raises(ConfigError, match=r"attention_positions \[50\]"):
        zt.write_trace(
            tmp_path / "odd", "odd", tokens=(ids, texts), attention=of("attention", [50]),
            positions=[116], attention_positions=[50],
        )  # fmt: skip
