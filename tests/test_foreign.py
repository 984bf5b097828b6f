"""Metadata that is damaged, foreign or implausible is named and refused."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
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
    "keys with dots": (
        "chunk_key_encoding",
        lambda node: node.update(
            chunk_key_encoding={"name": "default", "configuration": {"separator": "."}}
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
    "another node": ("not an array", lambda node: node.update(node_type="group")),
    "scale factor": ("scale_factor", lambda node: node["attributes"].update(scale_factor=2.0)),
    "offset": ("add_offset", lambda node: node["attributes"].update(add_offset=1.0)),
    "fill value": ("_FillValue", lambda node: node["attributes"].update(_FillValue=0.0)),
    "missing value": ("missing_value", lambda node: node["attributes"].update(missing_value=0.0)),
    "dates": ("units", lambda node: node["attributes"].update(units="days since 2000-01-01")),
}


def change_array(trace: Path, array: str, change: Change) -> None:
    """Change an array's metadata, and what the trace says of it, as a foreign writer would."""
    file = trace / array / "zarr.json"
    node = json.loads(file.read_bytes())
    change(node)
    content = json.dumps(node).encode()
    file.write_bytes(content)
    group = json.loads((trace / "zarr.json").read_bytes())
    group.pop("consolidated_metadata", None)
    own = group["attributes"]["zarrtrace"]
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    own["stored"]["metadata"][array] = {"bytes": len(content), "blake2b": digest}
    own.pop("blake2b", None)
    (trace / "zarr.json").write_text(json.dumps(group))


@pytest.mark.parametrize("name", _FOREIGN)
@pytest.mark.parametrize("array", ["attention", "features", "token_id"])
def test_arrays_that_others_read_otherwise_are_refused(
    run: fakes.FakeRun, name: str, array: str
) -> None:
    said, change = _FOREIGN[name]
    change_array(run.trace, array, change)
    with pytest.raises(IntegrityError, match=said):
        zt.open_trace(run.trace)
    with pytest.raises(IntegrityError, match=said):
        zt.open_run(run.path)
    assert any(said in problem.message for problem in verify(run.path))


def test_what_the_specification_leaves_open_is_read(run: fakes.FakeRun) -> None:
    def change(node: dict[str, Any]) -> None:
        node.update(chunk_key_encoding={"name": "default"})  # "/" if nothing is said
        del node["storage_transformers"]
        node["note"] = {"must_understand": False, "text": "by somebody"}

    change_array(run.trace, "features", change)
    found = zt.open_trace(run.trace)["features"].to_numpy()
    np.testing.assert_array_equal(found, run.truth[fakes.SCENARIOS[0]]["features"])


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


@pytest.mark.parametrize("damage", _DAMAGED)
@pytest.mark.parametrize("file", _INDEX_FILES)
def test_damaged_metadata_of_an_index_is_named(run: fakes.FakeRun, damage: str, file: str) -> None:
    build_index(run.path)
    (run.path / "index" / file).write_bytes(_DAMAGED[damage])
    feature = int(run.truth[fakes.SCENARIOS[0]]["features"][0].max(0).argmax())
    with pytest.raises(ZarrtraceError, match=r"zarr\.json"):
        find_feature(run.path, 1, feature)
    assert verify(run.path)


@pytest.mark.parametrize("file", _INDEX_FILES[1:])
def test_any_change_of_an_indexs_metadata_is_refused(run: fakes.FakeRun, file: str) -> None:
    """Field by field: gone, or of another kind."""
    build_index(run.path)
    feature = int(run.truth[fakes.SCENARIOS[0]]["features"][0].max(0).argmax())
    path = run.path / "index" / file
    content = json.loads(path.read_bytes())
    changed = [{**content, field: value} for field in content for value in (None, {}, 7, [[1]])]
    changed += [{key: content[key] for key in content if key != field} for field in content]
    for other in changed:
        path.write_text(json.dumps(other))
        with pytest.raises(IntegrityError, match=r"zarr\.json"):
            find_feature(run.path, 1, feature)


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


def test_a_million_scenarios_that_are_not_there(run: fakes.FakeRun) -> None:
    file = run.path / "zarr.json"
    group = json.loads(file.read_bytes())
    own = group["attributes"]["zarrtrace"]
    own["scenarios"] = [*own["scenarios"], *(f"s{number}" for number in range(10**6))]
    own.pop("blake2b", None)
    file.write_text(json.dumps(group))
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
