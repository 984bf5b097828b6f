"""Files exchanged for others of the same size, and runs replaced in an object store."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest

import zarrtrace as zt
from zarrtrace.errors import StoreError
from zarrtrace.storage import locate

SCENARIOS = tuple(f"Safe_{number}" for number in range(12))
SMALL: dict[str, Any] = {"scenarios": SCENARIOS, "layers": (1, 2), "tokens": 4, "active": 1.0}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    """A run of traces so small that many of their files have one size."""
    return fakes.make_run(tmp_path_factory.mktemp("many"), **SMALL)


def pairs(run: Path) -> list[tuple[Path, Path]]:
    """Return files of one size with other bytes, one pair of any two arrays."""
    found: dict[tuple[str, str, bool], list[tuple[Path, Path]]] = {}
    by_size: dict[int, list[Path]] = {}
    for file in sorted(run.rglob("*")):
        if file.is_file() and file.name != "zarr.json":
            by_size.setdefault(file.stat().st_size, []).append(file)
    for same in by_size.values():
        for one, other in itertools.combinations(same, 2):
            (trace, array), (trace_2, array_2) = (
                path.relative_to(run).parts[:2] for path in (one, other)
            )
            kept = found.setdefault((array, array_2, trace == trace_2), [])
            if len(kept) < 1 and one.read_bytes() != other.read_bytes():
                kept.append((one, other))
    return [pair for kept in found.values() for pair in kept]


def read_wrong(run: fakes.FakeRun, scenario: str, arrays: set[str]) -> list[str]:
    """Return those of some arrays that read as other values than were written, without an error."""
    wrong = []
    for how in ("open_trace", "open_run"):
        try:
            ds = (
                zt.open_trace(run.path / scenario)
                if how == "open_trace"
                else zt.open_run(run.path, scenarios=[scenario])[scenario].to_dataset()
            )
        except StoreError:
            continue
        for name in arrays & run.truth[scenario].keys():
            expected = run.truth[scenario][name]
            for part in (slice(None), slice(-1, None)):
                try:
                    found = ds[name][part].values
                except StoreError:
                    continue
                if not np.array_equal(found, expected[part], equal_nan=expected.dtype.kind == "f"):
                    wrong.append(f"{how} {scenario} {name}")
    return wrong


def test_exchanged_files_are_never_read(many: fakes.FakeRun) -> None:
    chosen = pairs(many.path)
    arrays = {path.relative_to(many.path).parts[1] for pair in chosen for path in pair}
    assert {"attention", "features", "top_feature", "next_token"} <= arrays
    wrong = []
    for one, other in chosen:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        touched = [path.relative_to(many.path).parts[:2] for path in (one, other)]
        for scenario in sorted({scenario for scenario, _ in touched}):
            wrong += read_wrong(many, scenario, {array for _, array in touched})
        one.write_bytes(first)
        other.write_bytes(second)
    assert wrong == []


@pytest.mark.parametrize("read_before", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("how", ["open_trace", "open_run"])
def test_replaced_run_in_an_object_store_is_not_read(how: str, read_before: bool) -> None:
    folder = locate(f"memory://replaced/{how}-{read_before}")
    run = fakes.make_run(folder, scenarios=("Safe_1",))
    ds = (
        zt.open_trace(run.trace)
        if how == "open_trace"
        else zt.open_run(run.path)["Safe_1"].to_dataset()
    )
    if read_before:
        for name in ds.data_vars:
            ds[name][:1].load()
    fakes.make_run(folder, scenarios=("Safe_1",), seed=5, overwrite=True)
    for name in ds.data_vars:
        with pytest.raises(StoreError):
            ds[name][1:].load()
