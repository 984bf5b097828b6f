"""Metadata that is damaged, foreign or implausible is named and refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import hostile
import pytest

import zarrtrace as zt
from zarrtrace.errors import IncompleteError, IntegrityError, ZarrtraceError
from zarrtrace.index import build_index, find_feature
from zarrtrace.store import summarize, verify

Change = Callable[[dict[str, Any]], object]

_FOREIGN: dict[str, tuple[str, Change]] = {
    "storage transformers": (
        "storage_transformers",
        lambda node: node.update(storage_transformers=[{"name": "other"}]),
    ),
    "keys with slashes": (
        "chunk_key_encoding",
        lambda node: node.update(
            chunk_key_encoding={"name": "default", "configuration": {"separator": "/"}}
        ),
    ),
    "keys of version 2": (
        "chunk_key_encoding",
        lambda node: node.update(
            chunk_key_encoding={"name": "v2", "configuration": {"separator": "/"}}
        ),
    ),
    "another grid": ("chunk_grid", lambda node: node["chunk_grid"].update(name="rectangular")),
    "an unknown field": ("unknown field", lambda node: node.update(scaling={"factor": 2})),
    "another node": ("node_type", lambda node: node.update(node_type="group")),
    "scale factor": ("scale_factor", lambda node: node["attributes"].update(scale_factor=2.0)),
    "offset": ("add_offset", lambda node: node["attributes"].update(add_offset=1.0)),
    "fill value": ("_FillValue", lambda node: node["attributes"].update(_FillValue=0.0)),
    "missing value": ("missing_value", lambda node: node["attributes"].update(missing_value=0.0)),
    "dates": ("units", lambda node: node["attributes"].update(units="days since 2000-01-01")),
}


@pytest.mark.parametrize("name", _FOREIGN)
@pytest.mark.parametrize("array", ["attention", "features", "token_id"])
def test_arrays_that_others_read_otherwise_are_refused(
    run: fakes.FakeRun, name: str, array: str
) -> None:
    said, change = _FOREIGN[name]
    hostile.change_array(run.trace, array, change)
    with pytest.raises(IntegrityError, match=said):
        zt.open_trace(run.trace)
    with pytest.raises(IntegrityError, match=said):
        zt.open_run(run.path)
    assert any(said in problem.message for problem in verify(run.path))


# --- the index ---------------------------------------------------------------------------------

_DAMAGED = {
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "cut short": b'{"shape": [3',
    "a list": b"[]",
    "null": b"null",
    "no fields": b"{}",
    "nested deep": b"[" * 100_000,
    "a long number": b'{"shape": [' + b"9" * 5000 + b"]}",
}
_INDEX_FILES = (
    "zarr.json",
    *(
        f"{name}/zarr.json"
        for name in ("maximum", "token_activation", "token_scenario", "scenario")
    ),
)


@pytest.mark.long
@pytest.mark.parametrize("damage", _DAMAGED)
@pytest.mark.parametrize("file", _INDEX_FILES)
def test_damaged_metadata_of_an_index_is_named(run: fakes.FakeRun, damage: str, file: str) -> None:
    build_index(run.path)
    feature = int(run.truth[fakes.SCENARIOS[0]]["features"][0].max(0).argmax())
    found = find_feature(run.path, 1, feature)
    (run.path / "index" / file).write_bytes(_DAMAGED[damage])
    if file == "zarr.json":
        with pytest.raises(ZarrtraceError, match=r"zarr\.json|not a zarrtrace"):
            find_feature(run.path, 1, feature)
    else:  # readers take the sealed copy in the group's
        assert find_feature(run.path, 1, feature) == found
    assert verify(run.path)


def test_an_index_of_another_run_is_refused(tmp_path: Path) -> None:
    """Its scenarios and positions are beyond those of the run."""
    small = fakes.make_run(tmp_path, name="small", tokens=2, scenarios=("Safe_1",))
    large = fakes.make_run(tmp_path, name="large", tokens=9)
    build_index(large.path)
    (large.path / "index").rename(small.path / "index")
    refused = 0
    for feature in range(16):
        try:
            find_feature(small.path, 1, feature)
        except ZarrtraceError:
            refused += 1
    assert refused > 0


# --- many scenarios ----------------------------------------------------------------------------


@pytest.mark.long
def test_a_million_scenarios_that_are_not_there(run: fakes.FakeRun) -> None:
    def claim(group: Any) -> None:
        names = group["attributes"]["scenarios"]
        names += [f"s{number}" for number in range(10**6)]

    hostile.change_group(run.path, claim)
    file = run.path / "zarr.json"
    # Parsing and checking the names is most of it; a look at the disk for each takes several times
    # as long.
    start = time.process_time()
    json.loads(file.read_bytes())
    parsing = time.process_time() - start
    start = time.process_time()
    with pytest.raises(IncompleteError, match="1000000 of 1000002"):
        zt.open_run(run.path)
    assert time.process_time() - start < 60 * parsing
    assert len(summarize(run.path).traces) == 2
    assert len(zt.open_run(run.path, missing="nan").children) == 2
