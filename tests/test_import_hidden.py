"""Caches of hidden states become tables: the same numbers, rows named, nothing trusted."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from click.testing import CliRunner

import zarrtrace as zt
from zarrtrace.cli import group
from zarrtrace.errors import ConfigError, ConfigMismatchError, NPZError, ZarrtraceError
from zarrtrace.imports import hidden_files, import_hidden, is_hidden

SAMPLES, CHANNELS = 40, 6
LAYERS = (3, 7, 9)
FAILED = [4, 5, 31]


def _states(dtype: str = "float16", samples: int = SAMPLES) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((samples, len(LAYERS), CHANNELS)).astype(dtype)


def _columns(samples: int = SAMPLES) -> dict[str, np.ndarray]:
    """Return the columns of the user's files."""
    number = np.arange(samples)
    return {
        "game_ids": number // 4,
        "round_nums": (number % 4).astype(np.int32),
        "game_outcomes": np.array(["bankrupt", "stop"])[number % 2],
        "balances": np.where(number % 5, number / 4, np.nan).astype(np.float32),
        "is_last_round": number % 4 == 3,
        "valid_mask": ~np.isin(number, FAILED),
    }


def _npz(file: Path, **more: Any) -> Path:
    states = _states()
    states[FAILED] = 0
    np.savez_compressed(file, **{"hidden_states": states, **_columns(), **more})
    return file


def _check(run: Path, states: np.ndarray, layers: tuple[int, ...] = LAYERS) -> xr.Dataset:
    """Compare a table, read by plain xarray, with what was given."""
    ds: xr.Dataset = xr.open_zarr(run).load()
    assert ds.residual.dims == ("layer", "sample", "channel")
    assert ds.layer.to_numpy().tolist() == list(layers)
    assert ds.residual.dtype == ("float16" if states.dtype == np.float16 else "float32")
    np.testing.assert_array_equal(ds.residual.values, states.transpose(1, 0, 2))
    np.testing.assert_array_equal(zt.open_table(run).residual.values, ds.residual.values)
    return ds


def test_the_users_file(tmp_path: Path) -> None:
    file = _npz(tmp_path / "phase_a_hidden_states.npz", layer=np.array(3), odd=np.zeros((2, 2)))
    left_out = import_hidden(tmp_path, tmp_path / "run", layers=LAYERS)
    assert sorted(left_out) == ["layer", "odd"]
    expected = _states()
    expected[FAILED] = np.nan
    ds = _check(tmp_path / "run", expected)
    given = np.load(file)
    assert ds.game_ids.dtype == ds.round_nums.dtype == np.int64
    for name in _columns():
        if name != "valid_mask":
            np.testing.assert_array_equal(ds[name].values, given[name])
    assert ds.attrs["metadata"] == [
        "game_ids", "round_nums", "game_outcomes", "balances", "is_last_round",
    ]  # fmt: skip
    assert ds.scenario.to_numpy().tolist() == [f"scenario_{n}" for n in range(SAMPLES)]
    assert (ds.position == -1).all()
    assert (ds.span == "decision").all()
    chosen = zt.table(zt.open_table(tmp_path / "run"), at="decision")
    np.testing.assert_array_equal(chosen.residual.values, ds.residual.values)
    assert ds.attrs["failed"] == {f"scenario_{n}": "valid_mask is false" for n in FAILED}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["whole", "npy", "safetensors", "one file", "npz"])
def test_every_form_gives_the_same(kind: str, dtype: str, tmp_path: Path) -> None:
    states = _states(dtype)
    source = tmp_path / "cache"
    layers: tuple[int, ...] | None = None
    source.mkdir()
    if kind == "whole":
        np.save(source / "hidden_states.npy", np.asfortranarray(states))
        layers = LAYERS
    elif kind == "npz":
        source = source / "any.npz"
        np.savez(source, hidden_states=states, layers=np.array(LAYERS))
    elif kind == "one file":
        source = source / "anything.npy"
        np.save(source, states[:, 0])
        layers = (3,)
        states = states[:, :1]
    for at, layer in enumerate(LAYERS):
        if kind == "npy":
            np.save(source / f"layer_{layer}.npy", states[:, at])
        if kind == "safetensors":
            save = pytest.importorskip("safetensors.numpy").save_file
            save({"h": np.ascontiguousarray(states[:, at])}, source / f"layer_{layer}.safetensors")
    assert import_hidden(source, tmp_path / "run", layers=layers) == ()
    _check(tmp_path / "run", states, layers or LAYERS)


def test_some_layers_in_their_order(tmp_path: Path) -> None:
    states = _states()
    np.savez(tmp_path / "a.npz", hidden_states=states[:, [2, 0, 1]], layers=np.array([9, 3, 7]))
    import_hidden(tmp_path / "a.npz", tmp_path / "run", layers=[9, 3])
    _check(tmp_path / "run", states[:, [0, 2]], (3, 9))
    with pytest.raises(ConfigError, match="no layer 4"):
        import_hidden(tmp_path / "a.npz", tmp_path / "other", layers=[4])


@pytest.mark.torch
def test_bfloat16_is_exact(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    values = torch.randn(20, 5).to(torch.bfloat16)
    save(
        {"residual.layer_2": values, "other": values[:1].clone()}, tmp_path / "layer_2.safetensors"
    )
    import_hidden(tmp_path, tmp_path / "run")
    _check(tmp_path / "run", values.float().numpy()[:, None], (2,))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_metadata_from_a_file(ending: str, tmp_path: Path) -> None:
    np.save(tmp_path / "hidden_states.npy", _states())
    frame = pd.DataFrame(
        {
            "scenario": [f"game_{n // 2}" for n in range(SAMPLES)],
            "position": [10 + n % 2 for n in range(SAMPLES)],
            "token_id": range(SAMPLES),
            "span": ["decision", "balance,goal"] * (SAMPLES // 2),
            "code": [f"{n:03}" for n in range(SAMPLES)],
            "balance": [None if n == 3 else n / 2 for n in range(SAMPLES)],
            "won": [n % 3 == 0 for n in range(SAMPLES)],
            "valid_mask": [n // 2 != 7 for n in range(SAMPLES)],
        }
    )
    file = tmp_path / f"rows.{ending}"
    frame.to_csv(file, index=False) if ending == "csv" else frame.to_parquet(file)
    import_hidden(tmp_path, tmp_path / "run", layers=LAYERS, metadata=file)
    expected = _states()
    expected[[14, 15]] = np.nan
    ds = _check(tmp_path / "run", expected)
    for name in frame.columns[:-1]:
        np.testing.assert_array_equal(ds[name].values, frame[name].to_numpy())
    assert ds.token_id.dtype == np.uint32
    assert ds.attrs["metadata"] == ["code", "balance", "won"]
    assert ds.attrs["spans"] == ["decision", "balance", "goal"]
    assert ds.attrs["failed"] == {"game_7": "valid_mask is false"}
    assert ds.attrs["scenarios"] == SAMPLES // 2


@pytest.mark.parametrize("to", ["hidden", "safetensors"])
def test_an_export_comes_back(to: Any, tmp_path: Path) -> None:
    _npz(tmp_path / "phase_a_hidden_states.npz")
    import_hidden(tmp_path, tmp_path / "run", layers=LAYERS)
    zt.export(tmp_path / "run", tmp_path / "out", to=to)
    import_hidden(tmp_path / "out", tmp_path / "again")
    first, again = xr.open_zarr(tmp_path / "run"), xr.open_zarr(tmp_path / "again")
    xr.testing.assert_equal(first.load(), again.load())
    assert first.attrs["failed"] == again.attrs["failed"]
    assert set(first.attrs["metadata"]) == set(again.attrs["metadata"])


@pytest.mark.parametrize("compressed", [True, False])
def test_an_interrupted_import_is_resumed(
    compressed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = 9000
    states = _states("float32", samples)
    columns: dict[str, Any] = dict(_columns(samples))
    columns["valid_mask"] = valid = np.arange(samples) % 1000 != 0
    if compressed:
        source = tmp_path / "a.npz"
        np.savez_compressed(source, hidden_states=states, **columns)
    else:
        source = tmp_path / "hidden_states.npy"
        np.save(source, states)
        pd.DataFrame(columns).to_parquet(tmp_path / "rows.parquet")
    metadata = None if compressed else tmp_path / "rows.parquet"
    monkeypatch.setattr(hidden_files, "_BLOCK_BYTES", 2**16)

    def import_(name: str, stop: int = samples) -> None:
        def progress(done: int, total: int) -> None:
            assert total == samples
            if done > stop:
                raise KeyboardInterrupt

        import_hidden(source, tmp_path / name, layers=LAYERS, metadata=metadata, progress=progress)

    import_("whole")
    with pytest.raises(KeyboardInterrupt):
        import_("resumed", 5000)
    assert not (tmp_path / "resumed").exists()
    import_("resumed")
    files = {
        file.relative_to(tmp_path / "whole"): file.read_bytes()
        for file in (tmp_path / "whole").rglob("*")
        if file.is_file()
    }
    for name, content in files.items():
        assert (tmp_path / "resumed" / name).read_bytes() == content
    states[~valid] = np.nan
    _check(tmp_path / "whole", states)
    import_("whole")  # complete: nothing to do
    columns["game_ids"] = columns["game_ids"] + 1
    if compressed:
        np.savez_compressed(source, hidden_states=states, **columns)
        with pytest.raises(ConfigMismatchError):
            import_("whole")


def test_every_possible_token_id_is_kept(tmp_path: Path) -> None:
    ids = np.array([0, 1, 128_000, 2**31, 2**32 - 1] * (SAMPLES // 5))
    _npz(tmp_path / "a.npz", token_id=ids)
    import_hidden(tmp_path / "a.npz", tmp_path / "run", layers=LAYERS)
    np.testing.assert_array_equal(xr.open_zarr(tmp_path / "run").token_id, ids)


# --- refusals ---------------------------------------------------------------------------------


def _object_array() -> np.ndarray:
    return np.array(["a", {"b": 1}] * (SAMPLES // 2), object)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_states": _states().astype(np.float64)}, "hidden states of type float64"),
        ({"hidden_states": _states()[:, 0]}, r"'hidden_states' has shape \(40, 6\)"),
        ({"hidden_states": np.asfortranarray(_states())}, "in Fortran order"),
        ({"hidden_states": _states() * np.nan}, "row 0 of layer . holds NaN or infinity"),
        ({"valid_mask": np.ones(SAMPLES, bool)}, "row 4 of layer . holds zeros alone"),
        ({"valid_mask": np.ones(SAMPLES, int)}, "'valid_mask' is int64, not bool"),
        ({"paradigms": _object_array()}, "'paradigms' holds Python objects, which only pickle"),
        ({"layer": np.arange(SAMPLES)}, "'layer' cannot be metadata"),
        ({"a b": np.arange(SAMPLES)}, "'a b' cannot be metadata"),
        ({"z": np.arange(SAMPLES) * 1j}, "'z' is of type complex128"),
        ({"z": np.full(SAMPLES, 2**64 - 1, np.uint64)}, "'z' has whole numbers of more than 63"),
        ({"z": np.full(SAMPLES, np.inf)}, "'z' has infinite numbers"),
        (
            {"token_id": np.where(np.arange(SAMPLES) % 9 == 3, -100, 5)},
            "row 3: column 'token_id' has -100, which is no token's id",
        ),
        (
            {"token_id": np.arange(2**32 - 30, 2**32 + 10, dtype=np.uint64)},
            "row 30: column 'token_id' has 4294967296, which",
        ),
        ({"position": np.ones(SAMPLES)}, "'position' is float64, not int64"),
        ({"scenario": np.array(["a", "b"] * 20)}, "row 2: scenario 'a' stands in rows that are"),
        ({"scenario": np.array(["a"] * 40)}, "row 1: scenario 'a' has position -1 twice"),
        ({"scenario": np.array(["../a"] * 40)}, "row 0: scenario name '../a' is not safe"),
        (
            {"scenario": np.array(["a"] * 40), "position": np.arange(40)},
            "row 4: scenario 'a' has valid and other rows",
        ),
        ({"layers": np.array([1, 2])}, "holds 3 layers, and 2 are named"),
    ],
)
def test_wrong_files_are_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = _npz(tmp_path / "a.npz", **more)
    layers = None if "layers" in more else LAYERS
    with pytest.raises((NPZError, ConfigError), match=message) as caught:
        import_hidden(file, tmp_path / "run", layers=layers)
    assert caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_layers_are_never_guessed(tmp_path: Path) -> None:
    _npz(tmp_path / "a.npz")
    with pytest.raises(ConfigError, match="does not say which layers its 3 are") as caught:
        import_hidden(tmp_path / "a.npz", tmp_path / "run")
    assert "--layers 0-2" in caught.value.remedy
    with pytest.raises(ConfigError, match="holds 3 layers, and 2 are named"):
        import_hidden(tmp_path / "a.npz", tmp_path / "run", layers=[1, 2])


def test_no_pickle_is_read(tmp_path: Path) -> None:
    (tmp_path / "layer_1.npy").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(NPZError, match="cannot be read"):
        import_hidden(tmp_path, tmp_path / "run")
    np.save(tmp_path / "layer_1.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(NPZError):
        import_hidden(tmp_path, tmp_path / "run")


@pytest.mark.parametrize("cut", [0, 5, 9, 40, 300])
@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_cut_files_are_refused(kind: str, cut: int, tmp_path: Path) -> None:
    file = tmp_path / f"layer_1.{kind}"
    if kind == "npy":
        np.save(file, _states()[:, 0])
    elif kind == "npz":
        np.savez_compressed(file, hidden_states=_states())
    else:
        pytest.importorskip("safetensors.numpy").save_file({"h": _states()[:, 0].copy()}, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ZarrtraceError):
        import_hidden(file, tmp_path / "run", layers=[1] if kind != "npz" else LAYERS)
    assert not (tmp_path / "run").exists()


def test_files_of_other_sizes_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "layer_1.npy", _states()[:, 0])
    np.save(tmp_path / "layer_2.npy", _states()[:-1, 0])
    with pytest.raises(NPZError, match=r"layer_2\.npy: has shape \(39, 6\), layer_1\.npy has"):
        import_hidden(tmp_path, tmp_path / "run")
    np.save(tmp_path / "layer_02.npy", _states()[:, 0])
    (tmp_path / "layer_2.npy").write_bytes((tmp_path / "layer_02.npy").read_bytes())
    with pytest.raises(NPZError, match="is a second file of its layer"):
        import_hidden(tmp_path, tmp_path / "run")
    pd.DataFrame({"a": range(3)}).to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "layer_02.npy").unlink()
    with pytest.raises(NPZError, match="column 'a' has 3 rows, the hidden states 40"):
        import_hidden(tmp_path, tmp_path / "run", metadata=tmp_path / "rows.csv")


def test_an_archive_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    """A header of terabytes, on a few bytes."""
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        header = b"{'descr': '<f2', 'fortran_order': False, 'shape': (99999999, 32, 4096), }"
        header += b" " * (117 - len(header)) + b"\n"
        archive.writestr("hidden_states.npy", b"\x93NUMPY\x01\x00\x76\x00" + header + b"0" * 99)
    with pytest.raises(NPZError, match="has not the bytes of its shape"):
        import_hidden(file, tmp_path / "run", layers=range(32))


# --- the command ------------------------------------------------------------------------------


def test_the_command_tells_hidden_states_from_the_layout(tmp_path: Path) -> None:
    assert not is_hidden(tmp_path)
    _npz(tmp_path / "phase_a_hidden_states.npz", odd=np.zeros((2, 2)))
    arguments = ["import", str(tmp_path), "-o", str(tmp_path / "run"), "--layers", "3,7,9"]
    done = CliRunner().invoke(group, arguments)
    assert done.exit_code == 0, done.output
    assert "Left out, as they are not one value a sample: odd." in done.output
    assert "3 layers, 40 samples, 6 channels; 3 failed scenarios" in done.output
    assert zt.open_table(tmp_path / "run").sizes["sample"] == SAMPLES
