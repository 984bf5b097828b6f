"""Export to and import from the documented NPZ layout, judged by plain NumPy and zipfile."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_run_of_two_saes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import zarrtrace as zt
from zarrtrace.errors import (
    ConfigError,
    ConfigMismatchError,
    IncompleteError,
    IntegrityError,
    NoSpaceError,
    NPZError,
    ScenarioError,
)
from zarrtrace.format.attributes import SpanAttributes, TraceAttributes
from zarrtrace.format.layout import NO_ID, TraceShape
from zarrtrace.npz import archive, export_npz, exporting, import_npz, importing
from zarrtrace.records import FeatureRecord, LayerRecord, Tokens, TracePlan
from zarrtrace.store import RunWriter, open_run, open_trace, read_run

WHEN = datetime(2025, 10, 17, 12, 0, 0)
STAMP = "20251017_120000"
Values = dict[str, dict[int, dict[str, np.ndarray]]]


# --- small runs and folders --------------------------------------------------------------------


def npz_attention(
    rng: np.random.Generator, heads: int, tokens: int, sharpness: float = 1
) -> np.ndarray:
    scores = rng.normal(scale=sharpness, size=(heads, tokens, tokens))
    scores[:, ~np.tri(tokens, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def npz_features(rng: np.random.Generator, tokens: int, features: int, active: int) -> np.ndarray:
    out = np.zeros((tokens, features), np.float32)
    for row in out:
        row[rng.choice(features, active, replace=False)] = rng.gamma(2, size=active) + 0.3
    return out


def npz_values(
    *,
    scenarios: tuple[str, ...] = ("Risky_40", "Desperate_10"),
    layers: tuple[int, ...] = (1, 2, 3),
    keys: tuple[str, ...] = ("features", "attention"),
    without_sae: tuple[int, ...] = (),
    without_attention: tuple[int, ...] = (),
    queries: tuple[int, ...] | None = None,
    attention_dtype: str = "float32",
    tokens: int = 9,
) -> Values:
    rng = np.random.default_rng(7)
    out: Values = {}
    for at, name in enumerate(scenarios):
        size = tokens + at
        out[name] = {
            layer: {
                "features": npz_features(rng, size, 48, 6),
                "attention": npz_attention(rng, 4, size).astype(attention_dtype),
            }
            for layer in layers
        }
        absent = {"features": without_sae, "attention": without_attention}
        for layer, arrays in out[name].items():
            if queries is not None:
                arrays["attention"][:, [at for at in range(size) if at not in queries]] = np.nan
            for key in tuple(arrays):
                if key not in keys or layer in absent[key]:
                    del arrays[key]
    return out


def npz_first(values: Values, key: str) -> np.ndarray | None:
    arrays = (layer.get(key) for layers in values.values() for layer in layers.values())
    return next((array for array in arrays if array is not None), None)


def npz_tokens(values: Values, scenario: str) -> int:
    arrays = next(array for array in values[scenario].values() if array)
    return arrays["attention"].shape[1] if "attention" in arrays else arrays["features"].shape[0]


def npz_queries(by_layer: dict[int, dict[str, np.ndarray]]) -> tuple[int, ...] | None:
    """Rows of attention that are not NaN; None for all."""
    found = npz_first({"": by_layer}, "attention")
    if found is None or not np.isnan(found).any():
        return None
    return tuple(np.flatnonzero(~np.isnan(found[0, :, 0])).tolist())


def npz_write_run(path: Path, values: Values, *, stop_before: int | None = None) -> Path:
    """Write a run with the store's own writer."""
    layers = tuple(next(iter(values.values())))
    attention, features = npz_first(values, "attention"), npz_first(values, "features")
    with RunWriter(path, list(values), {}) as run:
        for scenario, by_layer in values.items():
            size = npz_tokens(values, scenario)
            missing = {
                key: [layer for layer in layers if key not in by_layer[layer]]
                for key, array in (("attention", attention), ("features", features))
                if array is not None
            }
            queries = npz_queries(by_layer)
            attributes = TraceAttributes(
                scenario=scenario,
                prompt="what it says",
                spans={
                    "goal": SpanAttributes(characters=((3, 5),), tokens=(3, 2)),
                    "balance": SpanAttributes(characters=((0, 2),), tokens=(1,)),
                    "decision": SpanAttributes(characters=(), tokens=(size - 1,)),
                },
                model=None,
                layers=layers,
                layers_without_sae=tuple(missing.get("features", ())),
                layers_without_attention={"recurrent": tuple(missing["attention"])}
                if missing.get("attention")
                else {},
                attention_dtype=None if attention is None else attention.dtype.name,
                feature_dtype=None if features is None else features.dtype.name,
                versions={},
            )
            shape = TraceShape(
                layers=len(layers),
                tokens=size,
                heads=None if attention is None else attention.shape[0],
                features={} if features is None else {"features": features.shape[1]},
                attention_dtype=attributes.attention_dtype,
                feature_dtype=attributes.feature_dtype,
                next_token=False,
                attention_layers=len(layers) - len(missing["attention"])
                if missing.get("attention")
                else None,
            )
            tokens = Tokens(ids=range(size), texts=[f" té\n{at}" for at in range(size)])
            trace = run.trace(TracePlan(attributes, shape, tokens, attention_positions=queries))
            for layer, arrays in by_layer.items():
                if layer != stop_before:
                    trace.append(npz_record(scenario, layer, arrays))
            if stop_before is None:
                trace.finish()
        if stop_before is None:
            run.finish()
    return path


def npz_record(scenario: str, layer: int, arrays: dict[str, np.ndarray]) -> LayerRecord:
    attention, features = arrays.get("attention"), arrays.get("features")
    queries = npz_queries({layer: arrays})
    if attention is not None and queries is not None:
        attention = attention[:, queries]
    record: dict[str, Any] = {}
    if attention is not None:
        record |= {"attention": attention, "attention_mean": attention.mean(0, dtype=np.float32)}
    if features is not None:
        top = np.zeros((features.shape[0], min(32, features.shape[1])))
        found = FeatureRecord(features, top.astype(np.uint32), top.astype(np.float32))
        record["features"] = {"features": found}
    return LayerRecord(scenario=scenario, layer=layer, **record)


def npz_old_folder(path: Path, values: Values, **changes: Any) -> Path:
    """Write a folder as the user's own script does, with NumPy and json only."""
    for scenario, by_layer in values.items():
        (path / scenario).mkdir(parents=True)
        for layer, arrays in by_layer.items():
            np.savez_compressed(path / scenario / f"layer_{layer}.npz", **arrays)  # type: ignore[arg-type]
    layers = list(next(iter(values.values())))
    metadata = {
        "timestamp": STAMP,
        "n_scenarios": len(values),
        "layer_range": [layers[0], layers[-1]],
        "save_features": npz_first(values, "features") is not None,
        "save_attention": npz_first(values, "attention") is not None,
        "scenarios": [
            {
                "scenario": scenario,
                "tokens": [f"t{at}" for at in range(npz_tokens(values, scenario))],
                "token_ids": list(range(100, 100 + npz_tokens(values, scenario))),
                "seq_len": npz_tokens(values, scenario),
                "key_positions": {"goal": [5, 3], "balance": [2], "choices": []},
            }
            for scenario in values
        ],
        "model": "an extra field",
        **changes,
    }
    (path / f"metadata_L{layers[0]}_{layers[-1]}_{STAMP}.json").write_text(json.dumps(metadata))
    return path


def npz_files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def npz_assert_holds(folder: Path, values: Values) -> None:
    """Compare with what plain NumPy reads, bit for bit."""
    names = {f"{s}/layer_{layer}.npz" for s, by_layer in values.items() for layer in by_layer}
    assert {name for name in npz_files(folder) if name.endswith("npz")} == names
    for scenario, by_layer in values.items():
        for layer, arrays in by_layer.items():
            npz_assert_file(folder / scenario / f"layer_{layer}.npz", arrays)


def npz_assert_file(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with np.load(file, allow_pickle=False) as found:
        assert sorted(found.files) == sorted(arrays)
        for key, array in arrays.items():
            assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
            assert found[key].tobytes() == array.tobytes()


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default values, which no test may change."""
    return npz_write_run(tmp_path_factory.mktemp("npz") / "run", npz_values())


# --- export ------------------------------------------------------------------------------------


_KINDS: list[dict[str, Any]] = [
    {},
    {"keys": ("attention",)},
    {"keys": ("features",), "without_sae": (2,)},
    {"without_sae": (1, 3), "attention_dtype": "float16"},
    {"without_attention": (1, 3)},
    {"queries": (0, 4, 8), "without_sae": (1,)},
    {"layers": (0,), "tokens": 6},
]


@pytest.mark.parametrize("how", _KINDS, ids=str)
def test_export_import_export_is_bit_identical(tmp_path: Path, how: dict[str, Any]) -> None:
    values = npz_values(**{"scenarios": ("one",), **how})
    run = npz_write_run(tmp_path / "run", values)
    out = tmp_path / "new" / "out"
    layers = list(values["one"])

    written = export_npz(run, out, timestamp=WHEN)

    assert written == out / f"metadata_L{layers[0]}_{layers[-1]}_{STAMP}.json"
    npz_assert_holds(out, values)

    import_npz(out, tmp_path / "again")
    export_npz(tmp_path / "again", tmp_path / "two", timestamp=WHEN)
    assert npz_files(out) == npz_files(tmp_path / "two")


def test_metadata_has_the_documented_fields_and_one_more(tmp_path: Path, default_run: Path) -> None:
    file = export_npz(default_run, tmp_path / "out", timestamp=WHEN)

    found = json.loads(file.read_text("utf-8"))
    assert list(found)[-1] == "zarrtrace"
    own = found.pop("zarrtrace")
    assert list(own) == [one["scenario"] for one in found["scenarios"]]
    assert set(own["Risky_40"]) == {"tags", "prompt", "model"}

    assert list(found) == [
        "timestamp",
        "n_scenarios",
        "layer_range",
        "save_features",
        "save_attention",
        "scenarios",
    ]
    assert found | {"scenarios": 0} == {
        "timestamp": STAMP,
        "n_scenarios": 2,
        "layer_range": [1, 3],
        "save_features": True,
        "save_attention": True,
        "scenarios": 0,
    }
    assert found["scenarios"][0] == {
        "scenario": "Risky_40",
        "tokens": [f" té\n{at}" for at in range(9)],
        "token_ids": list(range(9)),
        "seq_len": 9,
        "key_positions": {"goal": [3, 2], "balance": [1]},
    }
    assert [entry["scenario"] for entry in found["scenarios"]] == ["Risky_40", "Desperate_10"]


def test_part_of_a_run(tmp_path: Path, default_run: Path) -> None:
    values = npz_values()
    calls: list[tuple[int, int]] = []

    file = export_npz(
        default_run,
        tmp_path / "out",
        scenarios=["Desperate_10"],
        layers=[3, 1],
        output_dtype="float16",
        progress=lambda *call: calls.append(call),
        timestamp=WHEN,
    )

    wanted = {
        "Desperate_10": {
            layer: {key: a.astype("f2") for key, a in values["Desperate_10"][layer].items()}
            for layer in (1, 3)
        }
    }
    npz_assert_holds(tmp_path / "out", wanted)
    assert file.name == f"metadata_L1_3_{STAMP}.json"
    assert calls == [(1, 2), (2, 2)]


def test_one_trace(tmp_path: Path, default_run: Path) -> None:
    values = npz_values()
    export_npz(default_run / "Risky_40", tmp_path / "out", timestamp=WHEN)
    npz_assert_holds(tmp_path / "out", {"Risky_40": values["Risky_40"]})


def test_same_bytes_again_over_an_old_export_and_with_any_number_of_threads(
    tmp_path: Path, default_run: Path
) -> None:
    export_npz(default_run, tmp_path / "out", timestamp=WHEN, threads=1)
    before = npz_files(tmp_path / "out")
    export_npz(default_run, tmp_path / "out", timestamp=WHEN, threads=5, overwrite=True)
    assert npz_files(tmp_path / "out") == before


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        *(f"attention {tokens} {sharpness}" for tokens in (5, 40, 121) for sharpness in (0.3, 4)),
        *(f"features {tokens} {active}" for tokens in (5, 121) for active in (1, 50, 200)),
    ],
)
def test_files_are_no_larger_than_numpys(case: str, precision: str) -> None:
    key, tokens, how = case.split()
    rng = np.random.default_rng(1)
    if key == "attention":
        values = npz_attention(rng, 8, int(tokens), float(how))
    else:
        values = npz_features(rng, int(tokens), 1024, int(how))
    if precision == "bfloat16":
        array = (values.view(np.uint32) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    else:
        array = values.astype(precision)
    ours, numpys = io.BytesIO(), io.BytesIO()
    archive.write_npz(ours, [(key, array)])
    np.savez_compressed(numpys, **{key: array})  # type: ignore[arg-type]
    assert len(ours.getvalue()) <= len(numpys.getvalue())


@pytest.mark.parametrize("limit", [2**31 - 1, 1500, 0])
def test_archive_is_sound_also_beyond_2_gib(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [("features", npz_features(rng, 9, 64, 5)), ("attention", npz_attention(rng, 2, 9))]
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)  # what lies above takes ZIP64 fields
    out = io.BytesIO()
    archive.write_npz(out, arrays)
    with zipfile.ZipFile(out) as found:
        assert found.testzip() is None
        assert {info.date_time for info in found.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    out.seek(0)
    with np.load(out, allow_pickle=False) as loaded:
        assert loaded.files == ["features", "attention"]
        for key, array in arrays:
            np.testing.assert_array_equal(loaded[key], array)


def test_unknown_scenario_and_layer_name_what_there_is(tmp_path: Path, default_run: Path) -> None:
    with pytest.raises(ScenarioError, match=r"(?s)'nope'.*Risky_40, Desperate_10"):
        export_npz(default_run, tmp_path / "out", scenarios=["nope"])
    with pytest.raises(ConfigError, match=r"(?s)layer 9.*layers 1-3"):
        export_npz(default_run, tmp_path / "out", layers=[1, 9])
    with pytest.raises(ConfigError, match="no layer"):
        export_npz(default_run, tmp_path / "out", layers=[])
    with pytest.raises(ConfigError, match="no scenario"):
        export_npz(default_run, tmp_path / "out", scenarios=[])
    with pytest.raises(ConfigError, match="float64"):
        export_npz(default_run, tmp_path / "out", output_dtype="float64")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_incomplete_runs_are_refused(tmp_path: Path) -> None:
    run = npz_write_run(tmp_path / "run", npz_values(), stop_before=2)
    with pytest.raises(IncompleteError, match="2"):
        export_npz(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layer_files_of_another_export_are_refused(tmp_path: Path, default_run: Path) -> None:
    export_npz(default_run, tmp_path / "out", timestamp=WHEN)
    before = npz_files(tmp_path / "out")
    with pytest.raises(NPZError, match=r"(?s)4 layer files.*layer_.*remove"):
        export_npz(default_run, tmp_path / "out", layers=[1], timestamp=WHEN, overwrite=True)
    assert npz_files(tmp_path / "out") == before


@pytest.mark.parametrize("left", ["all", "metadata", "layers"])
def test_an_export_that_is_there_is_replaced_only_if_asked(
    tmp_path: Path, default_run: Path, left: str
) -> None:
    out, later = tmp_path / "out", WHEN.replace(year=2026)
    old = zt.export(default_run, out)
    if left == "layers":  # as an export that was interrupted leaves them
        old.unlink()
    if left == "metadata":
        for folder in (one for one in out.iterdir() if one.is_dir()):
            shutil.rmtree(folder)
    (out / "notes.txt").write_text("mine")
    before = npz_files(out)
    with pytest.raises(ConfigError, match=r"(?s)holds an export already: .*--overwrite"):
        zt.export(default_run, out)
    assert npz_files(out) == before
    new = export_npz(default_run, out, timestamp=later, overwrite=True)
    assert [*out.glob("metadata*")] == [new]
    assert (out / "notes.txt").read_text() == "mine"
    npz_assert_holds(out, npz_values())


def test_layers_with_nothing_to_export_are_refused(tmp_path: Path) -> None:
    values = npz_values(scenarios=("a",), keys=("features",), without_sae=(2,))
    run = npz_write_run(tmp_path / "run", values)
    with pytest.raises(ConfigError, match="neither attention nor features"):
        export_npz(run, tmp_path / "out", layers=[2])


def test_a_layer_that_the_first_of_several_saes_lacks_has_no_features(tmp_path: Path) -> None:
    run = make_run_of_two_saes(tmp_path)
    export_npz(run.path, tmp_path / "out", timestamp=WHEN)
    for scenario, truth in run.truth.items():
        for at, layer in enumerate((1, 2)):
            arrays = {"attention": truth["attention"][at]}
            if layer == 1:
                arrays["features"] = truth["features"][at]
            npz_assert_file(tmp_path / "out" / scenario / f"layer_{layer}.npz", arrays)
    import_npz(tmp_path / "out", tmp_path / "again")
    again = open_trace(tmp_path / "again" / "Safe_1")
    assert again.attrs["layers_without_sae"] == "2"
    np.testing.assert_array_equal(again.features[0], run.truth["Safe_1"]["features"][0])


def test_features_too_small_for_float16_still_fire(tmp_path: Path) -> None:
    values = npz_values(scenarios=("a",))
    values["a"][2]["features"][0, :2] = 1e-8, -1e-8
    values["a"][2]["attention"][0, 0, 0] = 1e-8
    run = npz_write_run(tmp_path / "run", values)
    export_npz(run, tmp_path / "out", output_dtype="float16")
    half = {
        layer: {key: array.astype("f2") for key, array in arrays.items()}
        for layer, arrays in values["a"].items()
    }
    half[2]["features"][0, :2] = 2**-24, -(2**-24)
    npz_assert_holds(tmp_path / "out", {"a": half})


def test_too_large_for_float16(tmp_path: Path) -> None:
    values = npz_values(scenarios=("a",), keys=("features",))
    values["a"][2]["features"][0, 0] = 70000
    run = npz_write_run(tmp_path / "run", values)
    with pytest.raises(NPZError, match="too large for float16"):
        export_npz(run, tmp_path / "out", output_dtype="float16")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (OSError(28, "No space left on device"), NoSpaceError),
        (OSError(5, "Input/output error"), NPZError),
        (MemoryError(), MemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failure_leaves_no_partial_file(
    tmp_path: Path,
    default_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    error: type[BaseException],
) -> None:
    write, calls = exporting.write_npz, []

    def failing(out: Any, arrays: Any) -> None:
        calls.append(1)
        out.write(b"half")
        if len(calls) > 1:
            raise fault
        out.seek(0)
        write(out, arrays)

    monkeypatch.setattr(exporting, "write_npz", failing)
    with pytest.raises(error) as raised:
        export_npz(default_run, tmp_path / "out", threads=1)
    if error is NoSpaceError:  # the same command alone would meet what this one has left
        assert "same command again with --overwrite" in str(raised.value)
    assert list(npz_files(tmp_path / "out")) == ["Risky_40/layer_1.npz"]


_KILLED = """
import os, signal, sys
from zarrtrace.npz import archive, export_npz

def compressor(array, pieces, calls=[]):
    calls.append(1)
    if len(calls) < 6:
        return best(array, pieces)
    os.kill(os.getpid(), signal.SIGKILL)

best, archive.best_compressor = archive.best_compressor, compressor
export_npz(sys.argv[1], sys.argv[2], threads=2)
"""


@pytest.mark.long
def test_killed_export_leaves_whole_files_only(tmp_path: Path, default_run: Path) -> None:
    values = npz_values()
    out = tmp_path / "out"
    process = subprocess.run([sys.executable, "-c", _KILLED, default_run, out], check=False)
    assert process.returncode == -signal.SIGKILL

    left = npz_files(out)
    assert any(name.endswith("-partial") for name in left)
    assert not any(name.startswith("metadata") for name in left)
    for name in (name for name in left if name.endswith(".npz")):
        scenario, layer = name.removesuffix(".npz").split("/layer_")
        npz_assert_file(out / name, values[scenario][int(layer)])

    export_npz(default_run, out, timestamp=WHEN, overwrite=True)
    npz_assert_holds(out, values)
    export_npz(default_run, tmp_path / "whole", timestamp=WHEN)
    assert npz_files(out) == npz_files(tmp_path / "whole")


def test_damaged_store_is_named(tmp_path: Path) -> None:
    run = npz_write_run(tmp_path / "run", npz_values(keys=("attention",)))
    file = run / "Risky_40/attention/c.0.0.0.0"
    content = bytearray(file.read_bytes())
    content[40] ^= 255
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"(?s)Risky_40/attention/c\.0\.0\.0\.0.*verify"):
        export_npz(run, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*-partial"))


def test_output_that_is_a_file(tmp_path: Path, default_run: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NPZError, match="cannot be written"):
        export_npz(default_run, tmp_path / "out")


# --- round trips -------------------------------------------------------------------------------


_FLOATS = {
    "float16": st.floats(0, 60000, width=16),
    "float32": st.floats(0, 2.0**100, width=32),
}


_weights = st.floats(0, 1, width=16)


@st.composite
def _npz_any_values(draw: st.DrawFn) -> Values:
    tokens, heads, features = (draw(st.integers(1, high)) for high in (7, 5, 70))
    dtypes = {key: draw(st.sampled_from(["float16", "float32"])) for key in ("a", "f")}
    keys = draw(st.sampled_from([("attention",), ("features",), ("features", "attention")]))
    layers = draw(st.integers(0, 40))
    shapes = {"attention": (heads, tokens, tokens), "features": (tokens, features)}
    values = {
        name: {
            layer: {
                key: draw(
                    hnp.arrays(
                        dtypes[key[0]],
                        shapes[key],
                        elements=_FLOATS[dtypes[key[0]]] if key == "features" else _weights,
                        fill=st.just(0),
                    )
                )
                for key in keys
            }
            for layer in (layers, layers + 1)
        }
        for name in ("A", "b.c")[: draw(st.integers(1, 2))]
    }
    for by_layer in values.values():
        for layer, arrays in by_layer.items():
            _make_plausible(layer, **arrays)
    return values


def _make_plausible(
    layer: int, attention: np.ndarray | None = None, features: np.ndarray | None = None
) -> None:
    """Change values in place to those of a causal model, with other ones in each layer."""
    if attention is not None:
        attention /= 2 * attention.shape[-1]
        attention *= np.tri(attention.shape[-1], dtype=attention.dtype)
        attention[0, :, 0] = 0.25 + 0.25 * (layer % 2)
    if features is not None:
        features[0, 0] = 1 + layer % 2


@settings(max_examples=5, deadline=None)
@given(values=_npz_any_values())
def test_any_values_survive_every_round_trip(values: Values) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        folder = npz_old_folder(path / "old", values, scenarios=npz_plain_metadata(values))
        import_npz(folder, path / "run")
        export_npz(path / "run", path / "one", timestamp=WHEN)
        npz_assert_holds(path / "one", values)
        import_npz(path / "one", path / "again")
        export_npz(path / "again", path / "two", timestamp=WHEN)
        assert npz_files(path / "one") == npz_files(path / "two")


def npz_plain_metadata(values: Values) -> list[dict[str, Any]]:
    return [
        {
            "scenario": name,
            "tokens": ["\N{SLOT MACHINE}"] * npz_tokens(values, name),
            "token_ids": [2**32 - 1] * npz_tokens(values, name),
            "seq_len": npz_tokens(values, name),
            "key_positions": {"z": [0], "a": [0, 0]},
        }
        for name in values
    ]


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=80),
        elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]),
    )
)
def test_strongest_features_are_those_of_a_stable_sort(values: np.ndarray) -> None:
    found = importing.with_strongest(values)
    order = np.argsort(-np.abs(values), axis=1, kind="stable")[:, :32]
    top = np.take_along_axis(values, order, axis=1)
    np.testing.assert_array_equal(found.top_feature, np.where(top != 0, order, NO_ID))
    np.testing.assert_array_equal(found.top_activation, top)
    assert found.top_activation.dtype == np.float32


# --- import ------------------------------------------------------------------------------------


def test_import_of_the_old_scripts_folder(tmp_path: Path) -> None:
    values = npz_values(attention_dtype="float16")
    folder = npz_old_folder(tmp_path / "old", values)
    calls: list[tuple[int, int]] = []

    import_npz(folder, tmp_path / "run", progress=lambda *call: calls.append(call))

    run = open_run(tmp_path / "run")
    assert list(run.children) == list(values)
    ds = open_trace(tmp_path / "run/Desperate_10")
    arrays = values["Desperate_10"][2]
    layer = ds.sel(layer=2)
    assert (ds.attention.dtype, ds.features.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(layer.attention, arrays["attention"])
    np.testing.assert_array_equal(layer.features, arrays["features"])
    np.testing.assert_array_equal(
        layer.attention_mean, arrays["attention"].mean(0, dtype=np.float32)
    )
    np.testing.assert_array_equal(layer.top_feature[:, 0], arrays["features"].argmax(1))
    assert list(ds.query_token.values) == [f"t{at}" for at in range(10)]
    assert list(ds.token_id.values) == list(range(100, 110))
    said = TraceAttributes.model_validate(ds.attrs)
    assert {name: span.tokens for name, span in said.spans.items()} == {
        "goal": (5, 3),
        "balance": (2,),
        "choices": (),
        "decision": (9,),
    }
    assert (said.model, said.prompt) == (None, None)
    assert "next_token" not in ds
    assert calls[-1] == (6, 6)
    assert str(tmp_path) not in (tmp_path / "run/zarr.json").read_text()
    assert read_run(tmp_path / "run").attributes.config["imported_from"] == "npz"


def test_import_keeps_the_rows_that_are_numbers(tmp_path: Path) -> None:
    values = npz_values(queries=(0, 4, 8))
    import_npz(npz_old_folder(tmp_path / "old", values), tmp_path / "run")

    ds = open_trace(tmp_path / "run/Desperate_10")

    assert ds.attention.dims == ("layer", "head", "attention_query", "key")
    assert ds.attention_query.values.tolist() == [0, 4, 8]
    for layer, arrays in values["Desperate_10"].items():
        rows = arrays["attention"][:, [0, 4, 8]]
        np.testing.assert_array_equal(ds.attention.sel(layer=layer), rows)
    assert ds.features.sizes["query"] == 10


def test_some_layers_only(tmp_path: Path) -> None:
    values = npz_values(layers=(1, 2, 3, 4))
    folder = npz_old_folder(tmp_path / "old", values)
    (folder / "Risky_40/layer_2.npz").unlink()

    import_npz(folder, tmp_path / "run", layers=[4, 1])
    export_npz(tmp_path / "run", tmp_path / "out")

    wanted = {name: {layer: by[layer] for layer in (1, 4)} for name, by in values.items()}
    npz_assert_holds(tmp_path / "out", wanted)
    with pytest.raises(ConfigError, match=r"(?s)layer 9.*1 to 4"):
        import_npz(folder, tmp_path / "no", layers=[9])


def test_the_newest_of_metadata_files_that_agree(tmp_path: Path, default_run: Path) -> None:
    values = npz_values()
    export_npz(default_run, tmp_path / "out", timestamp=WHEN)
    later = export_npz(default_run, tmp_path / "new", timestamp=WHEN.replace(year=2026))
    shutil.copy(later, tmp_path / "out")
    import_npz(tmp_path / "out", tmp_path / "again")
    assert list(open_run(tmp_path / "again").children) == list(values)


def test_the_metadata_file_can_be_said(tmp_path: Path) -> None:
    folder = npz_old_folder(tmp_path / "old", npz_values())
    file = next(folder.glob("metadata*"))
    other = json.loads(file.read_text())
    del other["scenarios"][0]
    other["n_scenarios"] = 1
    (folder / "metadata_L1_3_20300101_000000.json").write_text(json.dumps(other))
    with pytest.raises(NPZError, match=r"(?s)different.*metadata=NAME"):
        import_npz(folder, tmp_path / "run")
    import_npz(folder, tmp_path / "run", metadata=file.name)
    assert len(open_run(tmp_path / "run").children) == 2


def test_import_goes_on_and_never_mixes_folders(tmp_path: Path) -> None:
    values = npz_values(tokens=50)
    folder = npz_old_folder(tmp_path / "old", values)
    file = folder / "Desperate_10/layer_3.npz"
    np.savez(file, **values["Desperate_10"][3])  # type: ignore[arg-type]
    good = file.read_bytes()
    at = good.index(b"attention.npy") + 20000
    file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(NPZError, match=r"Desperate_10/layer_3\.npz"):
        import_npz(folder, tmp_path / "run")
    with pytest.raises(IncompleteError):
        open_run(tmp_path / "run")

    file.write_bytes(good)
    import_npz(folder, tmp_path / "run")
    import_npz(folder, tmp_path / "whole")
    ours, whole = npz_files(tmp_path / "run"), npz_files(tmp_path / "whole")
    assert ours == whole

    other = npz_values(tokens=50)
    other["Risky_40"][1]["features"] += 1
    npz_old_folder(tmp_path / "other", other)
    with pytest.raises(ConfigMismatchError, match="fingerprint"):
        import_npz(tmp_path / "other", tmp_path / "run")
    import_npz(tmp_path / "other", tmp_path / "run", overwrite=True)
    export_npz(tmp_path / "run", tmp_path / "out")
    npz_assert_holds(tmp_path / "out", other)


# --- bad input ---------------------------------------------------------------------------------

_BAD_FILE = "Risky_40/layer_2.npz"


def npz_resave(folder: Path, **arrays: Any) -> None:
    np.savez_compressed(folder / _BAD_FILE, **arrays)


def npz_members(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / _BAD_FILE) as found:
        return dict(found)


def npz_edit(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = next(folder.glob("metadata*"))
    metadata = json.loads(file.read_text())
    edit(metadata)
    file.write_text(json.dumps(metadata))


def npz_zip(folder: Path, members: dict[str, bytes], compression: int = 8) -> None:
    with zipfile.ZipFile(folder / _BAD_FILE, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npz_npy(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    out = io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + array.tobytes()


def _change(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        arrays = npz_members(folder)
        npz_resave(folder, **{k: changes.get(k, lambda a: a)(a) for k, a in arrays.items()})

    return act


def _metadata(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: npz_edit(folder, edit)


def _member(make: Callable[[np.ndarray], bytes]) -> Callable[[Path], None]:
    """Replace the member of features by bytes."""

    def act(folder: Path) -> None:
        arrays = npz_members(folder)
        npz_zip(
            folder,
            {
                "features.npy": make(arrays["features"]),
                "attention.npy": npz_npy(arrays["attention"]),
            },
        )

    return act


def _without(key: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        npz_resave(folder, **{k: a for k, a in npz_members(folder).items() if k != key})

    return act


def _patch_central(field: int, value: bytes) -> Callable[[Path], None]:
    """Overwrite bytes of the first central directory entry."""

    def act(folder: Path) -> None:
        content = bytearray((folder / _BAD_FILE).read_bytes())
        at = content.index(b"PK\1\2") + field
        content[at : at + len(value)] = value
        (folder / _BAD_FILE).write_bytes(content)

    return act


def _link_out(folder: Path) -> None:
    file = folder / _BAD_FILE
    outside = folder.parent / "outside.npz"
    file.rename(outside)
    file.symlink_to(outside)


def _link_scenario(folder: Path) -> None:
    (folder / "Risky_40").rename(folder.parent / "elsewhere")
    (folder / "Risky_40").symlink_to(folder.parent / "elsewhere")


def _odd_row(folder: Path) -> None:
    """Leave one row of attention out, but not in this layer."""
    for layer in (1, 3):
        file = folder / "Risky_40" / f"layer_{layer}.npz"
        with np.load(file) as found:
            arrays = dict(found)
        arrays["attention"][:, 4] = np.nan
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _write_metadata_text(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (next(folder.glob("metadata*")).write_bytes(text), None)[1]


def _rename_scenario(name: str) -> Callable[[Path], None]:
    return _metadata(lambda m: m["scenarios"][0].update(scenario=name))


def _scenario(**changes: Any) -> Callable[[Path], None]:
    return _metadata(lambda m: m["scenarios"][0].update(changes))


_BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    # one layer's file
    "missing file": (lambda f: (f / _BAD_FILE).unlink(), r"1 layer files are missing.*layer_2"),
    "empty file": (lambda f: (f / _BAD_FILE).write_bytes(b""), r"layer_2.*cannot be read"),
    "folder for a file": (
        lambda f: ((f / _BAD_FILE).unlink(), (f / _BAD_FILE).mkdir()),
        r"missing.*layer_2",
    ),
    "pickled objects": (
        _change(features=lambda a: np.array([[print, 1]], dtype=object)),
        r"layer_2.*(dtype|cannot be read)",
    ),
    "integers": (_change(features=lambda a: a.astype(np.int32)), r"layer_2.*dtype int32"),
    "big-endian": (_change(features=lambda a: a.astype(">f4")), r"layer_2.*dtype"),
    "Fortran order": (_change(features=np.asfortranarray), r"layer_2.*Fortran"),
    "another seq_len": (_change(features=lambda a: a[1:]), r"layer_2.*shape \(8, 48\)"),
    "not square": (_change(attention=lambda a: a[:, :, 1:]), r"layer_2.*shape"),
    "no heads": (_change(attention=lambda a: a[:0]), r"layer_2.*shape \(0, 9, 9\)"),
    "other features": (_change(features=lambda a: a[:, :40]), r"layer_2.*40 features.*48"),
    "other heads": (_change(attention=lambda a: a[:2]), r"layer_2.*2 heads.*4"),
    "other dtype": (_change(attention=lambda a: a.astype("f2")), r"layer_2.*float16.*float32"),
    "odd row": (_odd_row, r"layer_2.*other rows"),
    "NaN": (_change(features=lambda a: a * np.nan), r"layer_2.*NaN"),
    "infinity": (_change(attention=lambda a: a + np.inf), r"layer_2.*infinity"),
    "no attention": (_without("attention"), r"layer_2.*no 'attention'"),
    "no features": (_without("features"), r"layer_2.*no 'features'"),
    "unknown key": (lambda f: npz_resave(f, **npz_members(f), x=1), r"layer_2.*'x\.npy'"),
    "unsafe member": (lambda f: npz_zip(f, {"../features.npy": b""}), r"layer_2.*'\.\./feat"),
    "not npy": (_member(lambda a: b"hello world" * 99), r"layer_2.*cannot be read"),
    "odd npy version": (_member(lambda a: b"\x93NUMPY\7\0" + b" " * 99), r"layer_2.*version"),
    "header of code": (
        _member(lambda a: b"\x93NUMPY\1\0\x14\0__import__('os').x()"),
        r"layer_2.*cannot be read",
    ),
    "too few bytes": (_member(lambda a: npz_npy(a)[:-4]), r"layer_2.*do not fit its shape"),
    "too many bytes": (_member(lambda a: npz_npy(a) + b"\0" * 2**24), r"layer_2.*do not fit"),
    "bomb by shape": (_member(lambda a: npz_npy(a[:1, :1], (9, 10**15))), r"layer_2.*shape"),
    "bomb by overflow": (_member(lambda a: npz_npy(a, (2**62, 2**62))), r"layer_2.*shape"),
    "declared size": (_patch_central(24, b"\xff\xff\xff\x7f"), r"layer_2.*do not fit"),
    "encrypted": (_patch_central(8, b"\1\0"), r"layer_2.*cannot be read"),
    "link out": (_link_out, r"layer_2.*leads out"),
    "linked folder": (_link_scenario, r"layer_1.*leads out"),
    # the metadata file
    "no metadata": (lambda f: next(f.glob("meta*")).unlink(), "no metadata file"),
    "not JSON": (_write_metadata_text(b"{'a': 1}"), r"metadata_L1_3.*JSON"),
    "not UTF-8": (_write_metadata_text(b'{"timestamp": "\xff"}'), r"metadata_L1_3"),
    "deep": (_write_metadata_text(b"[" * 100000), r"metadata_L1_3"),
    "no scenarios": (_metadata(lambda m: m.pop("scenarios")), r"metadata_L1_3.*scenarios"),
    "none of them": (_metadata(lambda m: m.update(scenarios=[], n_scenarios=0)), r"scenarios"),
    "wrong count": (_metadata(lambda m: m.update(n_scenarios=5)), r"n_scenarios is 5"),
    "layer_range text": (_metadata(lambda m: m.update(layer_range="1-3")), r"layer_range"),
    "layer_range back": (_metadata(lambda m: m.update(layer_range=[3, 1])), r"layer_range"),
    "endless layers": (_metadata(lambda m: m.update(layer_range=[0, 10**12])), r"layer_range"),
    "nothing saved": (
        _metadata(lambda m: m.update(save_features=False, save_attention=False)),
        r"neither",
    ),
    "not saved": (_metadata(lambda m: m.update(save_attention=False)), r"holds 'attention'"),
    "no tokens": (_scenario(tokens=[], token_ids=[], seq_len=0), r"tokens"),
    "lengths": (_scenario(seq_len=8), r"seq_len 8 differ"),
    "tokens not text": (_scenario(tokens=[1] * 9), r"tokens\.0"),
    "surrogate": (_scenario(tokens=["\ud800"] * 9), r"metadata_L1_3"),
    "huge id": (_scenario(token_ids=[2**40] * 9), r"token_ids\.0"),
    "position beyond": (_scenario(key_positions={"goal": [9]}), r"goal is beyond"),
    "position negative": (_scenario(key_positions={"goal": [-1]}), r"key_positions\.goal"),
    "positions a number": (_scenario(key_positions={"goal": 3}), r"key_positions\.goal"),
    "other decision": (_scenario(key_positions={"decision": [3]}), r"decision is not the last"),
    "unsafe name": (_rename_scenario("../x"), r"metadata_L1_3.*'\.\./x'.*not safe"),
    "empty name": (_rename_scenario(""), r"is empty"),
    "same name": (_rename_scenario("desperate_10"), r"stands twice"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_input_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = npz_old_folder(tmp_path / "old", npz_values())
    spoil, message = _BAD[name]
    spoil(folder)
    with pytest.raises(NPZError, match=f"(?s){message}") as caught:
        import_npz(folder, tmp_path / "run")
    assert caught.value.remedy
    if name not in ("NaN", "infinity", "odd row"):  # only reading the values shows these
        assert not (tmp_path / "run").exists()


def _scores(attention: np.ndarray) -> np.ndarray:
    attention[1, 4, 2] = -5
    return attention


def _above_one(attention: np.ndarray) -> np.ndarray:
    attention[1, 4, 2] = 1.5
    return attention


def _large_sum(attention: np.ndarray) -> np.ndarray:
    attention[1, 4, :5] = 0.3
    return attention


def _empty_row(attention: np.ndarray) -> np.ndarray:
    attention[:, 4] = 0
    return attention


_NO_ATTENTION: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "a score": (_scores, r"holds -5, which is no probability"),
    "above 1": (_above_one, r"holds 1\.5, which is no probability"),
    "a sum above 1": (_large_sum, r"weights sum to 1\.5"),
    "transposed": (lambda a: a.swapaxes(1, 2), r"attend to tokens behind"),
    "reversed": (lambda a: a[:, :, ::-1], r"attend to tokens behind"),
    "never filled in": (_empty_row, r"0 in every head at token 4"),
    "zeros": (np.zeros_like, r"0 in every head at token 0"),
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", _NO_ATTENTION)
def test_attention_that_is_none_is_refused(tmp_path: Path, name: str, dtype: str) -> None:
    folder = npz_old_folder(tmp_path / "old", npz_values(attention_dtype=dtype))
    change, message = _NO_ATTENTION[name]
    arrays = npz_members(folder)
    npz_resave(folder, **{**arrays, "attention": np.ascontiguousarray(change(arrays["attention"]))})
    with pytest.raises(NPZError, match=rf"layer_2.*'attention' .*{message}"):
        import_npz(folder, tmp_path / "run")


@pytest.mark.parametrize("bits", [1, 2, 7])
def test_rounded_attention_is_imported(tmp_path: Path, bits: int) -> None:
    values = npz_values(tokens=40)
    for by_layer in values.values():
        for arrays in by_layer.values():
            exponent = np.exp2(np.floor(np.log2(np.maximum(arrays["attention"], 2**-100))) - bits)
            rounded = np.round(arrays["attention"] / exponent) * exponent
            arrays["attention"] = rounded.astype(np.float32)
    import_npz(npz_old_folder(tmp_path / "old", values), tmp_path / "run")


def test_attention_with_a_sink_is_imported(tmp_path: Path) -> None:
    values = npz_values()
    for by_layer in values.values():
        for arrays in by_layer.values():
            arrays["attention"] *= np.float32(0.01)
    import_npz(npz_old_folder(tmp_path / "old", values), tmp_path / "run")


def _copy_file(folder: Path, source: str, target: str) -> None:
    (folder / target).write_bytes((folder / source).read_bytes())


def test_files_of_scenarios_with_other_lengths_are_told_apart(tmp_path: Path) -> None:
    folder = npz_old_folder(tmp_path / "old", npz_values())
    _copy_file(folder, "Desperate_10/layer_1.npz", "Risky_40/layer_1.npz")
    with pytest.raises(NPZError, match=r"Risky_40/layer_1.*shape"):
        import_npz(folder, tmp_path / "run")


@pytest.mark.parametrize("keys", [("features",), ("attention",), ("features", "attention")])
def test_a_layer_that_is_a_copy_of_another_is_refused(
    tmp_path: Path, keys: tuple[str, ...]
) -> None:
    folder = npz_old_folder(tmp_path / "old", npz_values(keys=keys))
    _copy_file(folder, "Risky_40/layer_1.npz", "Risky_40/layer_3.npz")
    with pytest.raises(NPZError, match=r"layer_3.*holds the same '(features|attention)' as .*_1"):
        import_npz(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _equal_lengths() -> Values:
    values = npz_values(scenarios=("A",)) | npz_values(scenarios=("X", "B"), tokens=8)
    del values["X"]
    return values


def _tokens_of_b(metadata: dict[str, Any]) -> None:
    metadata["scenarios"][1]["token_ids"] = list(range(500, 509))


def test_a_scenario_that_is_a_copy_of_another_is_refused(tmp_path: Path) -> None:
    folder = npz_old_folder(tmp_path / "old", _equal_lengths())
    _copy_file(folder, "A/layer_2.npz", "B/layer_2.npz")
    npz_edit(folder, _tokens_of_b)
    with pytest.raises(NPZError, match=r"B/layer_2.*holds the same"):
        import_npz(folder, tmp_path / "run")


def test_equal_files_that_are_plausible_are_imported(tmp_path: Path) -> None:
    """Equal files of equal tokens, silent features or one token are accepted."""
    folder = npz_old_folder(tmp_path / "tokens", _equal_lengths())
    for layer in (1, 2, 3):
        _copy_file(folder, f"A/layer_{layer}.npz", f"B/layer_{layer}.npz")
    import_npz(folder, tmp_path / "run of tokens")
    silent = npz_values()
    for by_layer in silent.values():
        for arrays in by_layer.values():
            arrays["features"][:] = 0
    import_npz(npz_old_folder(tmp_path / "silent", silent), tmp_path / "run of silent")
    one = npz_values(scenarios=("A",), keys=("attention",))
    for arrays in one["A"].values():
        arrays["attention"] = np.ones((2, 1, 1), np.float32)
    metadata = npz_plain_metadata(one)
    import_npz(npz_old_folder(tmp_path / "one", one, scenarios=metadata), tmp_path / "run of one")


def test_the_command_says_what_it_cannot_tell(tmp_path: Path) -> None:
    folder = npz_old_folder(tmp_path / "old", npz_values())
    command = [sys.executable, "-m", "zarrtrace", "import", str(folder), "-o"]
    said = subprocess.run(
        [*command, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert "Not told by NPZ files" in said.stderr
    assert "Not told" not in said.stdout


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(NPZError, match="no such folder"):
        import_npz(tmp_path / "nope", tmp_path / "run")


def test_features_in_no_file_at_all(tmp_path: Path) -> None:
    values = npz_values(keys=("attention",))
    folder = npz_old_folder(tmp_path / "old", values, save_features=True)
    with pytest.raises(NPZError, match=r"has no 'features'(?s:.*)no file has any"):
        import_npz(folder, tmp_path / "run")


def test_bytes_beyond_deflate(tmp_path: Path) -> None:
    """A stored size that the compressed bytes cannot hold is refused unread."""
    folder = npz_old_folder(tmp_path / "old", npz_values(keys=("features",)))
    wide = np.zeros((9, 2**21), np.float32)
    header = npz_npy(wide)[:128]
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    short = compressor.compress(header) + compressor.flush()
    npz_zip(folder, {"features.npy": npz_npy(wide)})
    content = bytearray((folder / _BAD_FILE).read_bytes())
    at = content.index(b"PK\1\2")
    content[at + 20 : at + 24] = len(short).to_bytes(4, "little")
    (folder / _BAD_FILE).write_bytes(content)
    with pytest.raises(NPZError, match=r"layer_2"):
        import_npz(folder, tmp_path / "run")


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_relative_paths(tmp_path: Path) -> None:
    npz_old_folder(tmp_path / "old", npz_values())
    with _working_in(tmp_path):
        import_npz("old", "run")
        export_npz("run", "out", timestamp=WHEN)
    npz_assert_holds(tmp_path / "out", npz_values())
