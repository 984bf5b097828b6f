"""Frozen runs of every released format version stay readable, value for value."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import zarrtrace as zt
from zarrtrace.format.attributes import FORMAT_VERSION
from zarrtrace.store import read_run_attributes, read_trace_attributes, summarize, verify

DATA = Path(__file__).parent / "data"
VERSIONS = sorted(DATA.glob("format_v*"))


def test_every_version_is_frozen() -> None:
    assert [path.name for path in VERSIONS] == [
        f"format_v{version}" for version in range(1, FORMAT_VERSION + 1)
    ]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_arrays_are_what_was_frozen(folder: Path) -> None:
    tree = zt.open_run(folder / "run")
    plain = xr.open_datatree(folder / "run", engine="zarr")
    seen = set()
    with np.load(folder / "expected.npz", allow_pickle=False) as expected:
        for key in expected.files:
            scenario, name = key.split("/")
            for found in (tree[scenario][name], plain[scenario][name]):
                values = found.values
                if values.dtype.kind in "OTU":
                    assert values.tolist() == expected[key].tolist()
                    continue
                assert values.dtype == expected[key].dtype, key
                np.testing.assert_array_equal(values, expected[key], err_msg=key)
            seen.add(key)
    assert seen == {
        f"{scenario}/{name}" for scenario in tree.children for name in tree[scenario].variables
    }


def _as_far_as(found: object, frozen: object) -> object:
    """Leave out fields that are younger than the frozen run: they have their defaults."""
    if isinstance(found, dict) and isinstance(frozen, dict):
        return {key: _as_far_as(found[key], value) for key, value in frozen.items()}
    if isinstance(found, list) and isinstance(frozen, list) and len(found) == len(frozen):
        return [_as_far_as(one, other) for one, other in zip(found, frozen, strict=True)]
    return found


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_attributes_are_what_was_frozen(folder: Path) -> None:
    expected = json.loads((folder / "expected_attributes.json").read_text(encoding="utf-8"))
    run = read_run_attributes(folder / "run")
    found = {"run": run.model_dump(mode="json")}
    for scenario in run.scenarios:
        attributes = read_trace_attributes(folder / "run" / scenario)
        found[f"run/{scenario}"] = attributes.model_dump(mode="json")
    assert found.keys() == expected.keys()
    for node, frozen in expected.items():
        assert _as_far_as(found[node], frozen) == frozen
    assert zt.open_run(folder / "run").attrs == found["run"]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_frozen_runs_are_complete_and_undamaged(folder: Path) -> None:
    assert verify(folder / "run") == []
    assert summarize(folder / "run").complete
    assert zt.span(zt.open_run(folder / "run")["Safe_1"].to_dataset(), "balance") == [1, 2]
