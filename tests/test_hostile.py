"""Hostile stores: whatever their metadata says, nothing but what was written is read.

Seals and checksums fit, as somebody makes them who knows the format. Readers raise our own errors,
or return the numbers that were stored; they allocate no memory for what is claimed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import hostile
import numpy as np
import pytest
from numcodecs import Blosc, VLenUTF8, Zstd

import zarrtrace as zt
from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.store import read_run, summarize, verify

#: Numbers and texts that stand nowhere in metadata.
ODD = (None, True, -1, 0, 1.5, 10**18, 10**30, "", "../x", "\ud800", [], {}, [[]], {"a": 1})


def places(found: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in nested JSON."""
    steps = found.items() if isinstance(found, dict) else enumerate(found)
    for key, value in steps:
        yield (*way, key)
        if isinstance(value, dict | list):
            yield from places(value, (*way, key))


def assert_unread_or_the_same(run: fakes.FakeRun) -> None:
    """Whatever can be read equals what was written."""
    try:
        ds = zt.open_trace(run.trace)
    except StoreError:
        return
    for name, expected in run.truth[run.trace.name].items():
        if name not in ds.variables:
            continue
        try:
            found = ds[name].values
        except IntegrityError:
            continue
        np.testing.assert_array_equal(found, expected, err_msg=name)


#: Every day, each place gets some of the odd values; with 1, all.
STEPS = (pytest.param(1, marks=pytest.mark.long), 5)


@pytest.mark.long
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("array", ["attention", "features", "query", "key_token", "next_token"])
def test_odd_metadata_of_an_array_is_refused(run: fakes.FakeRun, array: str, step: int) -> None:
    good = (run.trace / "zarr.json").read_bytes()
    group = json.loads(good)
    node = group["consolidated_metadata"]["metadata"][array]
    harmless = {"long_name", "description", "storage_transformers"}
    for number, way in enumerate(places(node)):
        for odd in ODD[number % step :: step]:
            changed = copy.deepcopy(group)
            hostile.setting("consolidated_metadata", "metadata", array, *way, odd)(changed)
            is_fill = way == ("fill_value",) and odd in (0, "") and type(odd) is not bool
            if changed == group or is_fill or way[-1] in harmless:
                continue
            (run.trace / "zarr.json").write_bytes(hostile.sealed(changed))
            try:
                found = zt.open_trace(run.trace)[array].values
            except IntegrityError:
                continue
            # Layers may be missing: they read as NaN.
            assert way[-1] == "checksums", f"{way} may be {odd!r}"
            assert np.isnan(found).all()
    (run.trace / "zarr.json").write_bytes(good)
    assert verify(run.path) == []


@pytest.mark.long
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("of_run", [False, True], ids=["trace", "run"])
def test_odd_attributes_never_change_what_is_read(
    run: fakes.FakeRun, of_run: bool, step: int
) -> None:
    folder = run.path if of_run else run.trace
    group = json.loads((folder / "zarr.json").read_bytes())
    nodes, group["consolidated_metadata"]["metadata"] = (
        group["consolidated_metadata"]["metadata"],
        {},
    )
    ways = list(places(group))
    group["consolidated_metadata"]["metadata"] = nodes
    for number, way in enumerate(ways):
        for odd in ODD[number % step :: step]:
            changed = copy.deepcopy(group)
            hostile.setting(*way, odd)(changed)
            (folder / "zarr.json").write_bytes(hostile.sealed(changed))
            assert_unread_or_the_same(run)
            for read in (zt.open_run, summarize, verify) if of_run else (summarize,):
                with contextlib.suppress(StoreError):
                    read(run.path)


def test_a_run_names_no_metadata_outside_it(run: fakes.FakeRun, opened_files: list[str]) -> None:
    def change(group: Any) -> None:
        group["consolidated_metadata"]["metadata"]["../elsewhere/attention"] = {}

    hostile.change_group(run.path, change)
    opened_files.clear()
    (problem,) = verify(run.path)
    assert "'..'" in problem.message
    assert all(Path(file).resolve().is_relative_to(run.path) for file in opened_files)


# --- chunks ------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    return bytes(Zstd(level=1).encode(content))


def blosc(numbers: bytes, **claims: int) -> bytes:
    """Return what Blosc makes of bytes, with other sizes in its header."""
    found = bytearray(Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE).encode(numbers))
    for at, field in ((4, "content"), (8, "block"), (12, "all")):
        if field in claims:
            found[at : at + 4] = claims[field].to_bytes(4, "little")
    return bytes(found)


TEXTS = VLenUTF8().encode(np.array(["a"] * 7, dtype=object))
CHUNKS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "nothing": ("token_id", lambda: b""),
    "a gigabyte of numbers": ("token_id", lambda: zstd(bytes(2**30))),
    "a gigabyte of text": ("key_token", lambda: zstd(bytes(2**30))),
    "an exabyte": ("token_id", lambda: b"(\xb5/\xfd\xe4" + b"\xff" * 7 + b"\x0f" + bytes(9)),
    "an unknown size": ("token_id", lambda: b"(\xb5/\xfd\x00X\x01\x00\x00"),
    "four thousand million texts": ("key_token", lambda: zstd(b"\xff" * 4 + bytes(TEXTS[4:]))),
    "fewer texts": ("key_token", lambda: zstd((6).to_bytes(4, "little") + bytes(TEXTS[4:]))),
    "a text beyond the end": ("key_token", lambda: zstd(bytes(TEXTS[:4]) + b"\xff" * 32)),
    "a text that is not UTF-8": ("key_token", lambda: zstd(bytes(TEXTS[:-1]) + b"\xff")),
}
LAYERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "nothing": ("attention", lambda: b""),
    "a gigabyte": ("features", lambda: zstd(bytes(2**30))),
    "10 GB": ("features", lambda: b"(\xb5/\xfd\xe0" + (10**10).to_bytes(8, "little") + bytes(9)),
    "fewer numbers": ("features", lambda: zstd(bytes(4))),
    "4 GB by Blosc": ("attention", lambda: blosc(bytes(392), content=2**32 - 1)),
    "fewer numbers by Blosc": ("attention", lambda: blosc(bytes(388))),
    "bytes behind the chunk": ("attention", lambda: blosc(bytes(392), all=2**31)),
    "a block of 4 GB": ("attention", lambda: blosc(bytes(392), block=2**31)),
    "a header alone": ("attention", lambda: blosc(bytes(392))[:15]),
}


@pytest.mark.parametrize("what", CHUNKS)
def test_a_chunk_that_claims_something_else_is_refused(run: fakes.FakeRun, what: str) -> None:
    array, content = CHUNKS[what]
    hostile.replace_chunk(run.trace, array, content())
    ds = zt.open_trace(run.trace)
    with pytest.raises(IntegrityError, match=array):
        ds[array].load()


@pytest.mark.parametrize("what", LAYERS)
def test_a_chunk_of_a_layer_that_claims_something_else_is_refused(
    run: fakes.FakeRun, what: str
) -> None:
    array, content = LAYERS[what]
    hostile.replace_first_chunk(run.trace, array, content())
    ds = zt.open_trace(run.trace)
    with pytest.raises(IntegrityError, match=array):
        ds[array][0].load()
    # The other layers stand behind it, and are read.
    np.testing.assert_array_equal(ds[array][1], run.truth["Safe_1"][array][1])


INDEXES: dict[str, Callable[[np.ndarray], object]] = {
    "an offset of an exabyte": lambda e: e.__setitem__((0, 0), 2**60),
    "an offset that wraps": lambda e: e.__setitem__(0, (2**64 - 2, 3)),
    "a length of an exabyte": lambda e: e.__setitem__((1, 1), 2**60),
    "a length that wraps": lambda e: e.__setitem__((1, 1), 2**64 - 1),
    "two chunks in one place": lambda e: e.__setitem__(1, e[0]),
    "two chunks exchanged": lambda e: e.__setitem__(slice(2), e[1::-1].copy()),
    "a chunk that is not stored": lambda e: e.__setitem__(1, 2**64 - 1),
    "a chunk half stored": lambda e: e.__setitem__((2, 0), 2**64 - 1),
    "the file's own end": lambda e: e.__setitem__((2, 1), e[2, 1] + 8),
}


@pytest.mark.parametrize("what", INDEXES)
@pytest.mark.parametrize("array", ["attention", "features"])
def test_an_index_that_points_elsewhere_is_refused(
    run: fakes.FakeRun, array: str, what: str
) -> None:
    """Its own checksum fits, and so does the file's fingerprint."""
    entries = hostile.index_of(run.trace, array)
    INDEXES[what](entries)
    hostile.replace_index(run.trace, array, entries)
    ds = zt.open_trace(run.trace)
    for layer in range(3):
        with pytest.raises(IntegrityError, match=array):
            ds[array][layer].load()
    assert {problem.array for problem in verify(run.path)} == {array}


def test_a_shard_of_a_thousand_million_chunks_is_refused(run: fakes.FakeRun) -> None:
    def many(node: Any) -> None:
        node["chunk_grid"]["configuration"]["chunk_shape"] = [3, 10**9, 16]

    hostile.change_array(run.trace, "features", many)
    with pytest.raises(IntegrityError, match="features"):
        zt.open_trace(run.trace)
    assert len(verify(run.path)) >= 1


# --- journals ----------------------------------------------------------------------------------


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """A trace of which the last layer is missing."""
    return stage(tmp_path)


def stage(folder: Path) -> Path:
    begun = fakes.make_run(folder, scenarios=("Safe_1",), drop={"Safe_1": (3,)})
    return begun.path / ".staged" / "Safe_1"


@functools.cache
def uninterrupted() -> tuple[fakes.Truth, dict[str, bytes]]:
    """Return the arrays and the files of the run that a staged trace belongs to."""
    with tempfile.TemporaryDirectory() as folder:
        run = fakes.make_run(Path(folder), scenarios=("Safe_1",))
        return run.truth["Safe_1"], fakes.files_in(run.path)


def goes_on(staged: Path, *, readable: bool = False) -> fakes.FakeRun:
    """Read a staged trace, then complete it: what was stored, and nothing else."""
    run = staged.parents[1]
    truth, files = uninterrupted()
    summarize(run)
    try:
        found = zt.open_trace(run / "Safe_1", missing="nan")
    except StoreError:
        found = None
        assert not readable
    for name, expected in truth.items() if found is not None else ():
        assert found is not None
        try:
            values = found[name].values
        except IntegrityError:
            continue
        if expected.dtype.kind == "f":
            same = (values == expected) | np.isnan(values)
            assert same.all(), name
    again = fakes.make_run(run.parent, scenarios=("Safe_1",))
    assert verify(again.path) == []
    assert fakes.files_in(again.path) == files
    return again


JOURNALS: dict[str, tuple[int, Callable[[list[Any]], object]]] = {
    # How many layers are stored again, and how lines are changed.
    "no change": (1, lambda lines: None),
    "a header that is a list": (3, lambda lines: lines.__setitem__(0, [1])),
    "a header of nothing": (3, lambda lines: lines.__setitem__(0, {})),
    "a header nested deep": (3, lambda lines: lines.__setitem__(0, b"[" * 100_000)),
    "a header that is no JSON": (3, lambda lines: lines.__setitem__(0, b"\xff")),
    "attributes of nothing": (3, lambda lines: lines[0].update(attributes=None)),
    "arrays of nothing": (3, lambda lines: lines[0].update(arrays=[])),
    "files of nothing": (
        3, lambda lines: lines[0]["arrays"]["query"]["attributes"].update(checksums=None)),
    "files that are text": (
        3, lambda lines: lines[0]["arrays"]["query"]["attributes"].update(checksums="c.0")),
    "an array of absurd size": (
        3, lambda lines: lines[0]["arrays"]["features"].update(shape=[3, 10**18, 16])),
    "versions of numbers": (3, lambda lines: lines[0]["attributes"].update(versions={"a": 1})),
    "a line that is no object": (3, lambda lines: lines.__setitem__(1, 7)),
    "a line of nothing": (3, lambda lines: lines.__setitem__(1, {})),
    "a line of 9,000 digits": (3, lambda lines: lines.__setitem__(1, b"9" * 9000)),
    "a layer the trace does not have": (2, lambda lines: lines[2].update(layer=99)),
    "a layer that comes later": (2, lambda lines: lines[2].update(layer=3)),
    "a layer twice": (2, lambda lines: lines[2].update(layer=1)),
    "a layer in words": (2, lambda lines: lines[2].update(layer="2")),
    "a layer that is a list": (2, lambda lines: lines[2].update(layer=[2])),
    "a layer that is true": (3, lambda lines: lines[1].update(layer=True)),
    "chunks of nothing": (3, lambda lines: lines[1].update(chunks=None)),
    "chunks that are a list": (3, lambda lines: lines[1].update(chunks=[1, 2])),
    "no chunks": (3, lambda lines: lines[1].update(chunks={})),
    "an array less": (3, lambda lines: lines[1]["chunks"].pop("features")),
    "an array the trace does not have": (
        3, lambda lines: lines[1]["chunks"].update({"../x": [[9, 9]]})),
    "an array without layers": (3, lambda lines: lines[1]["chunks"].update(query=[[9, 9]])),
    "a chunk more": (3, lambda lines: lines[1]["chunks"]["features"].append([9, 9])),
    "a chunk less": (3, lambda lines: lines[1]["chunks"]["features"].clear()),
    "a chunk that is a number": (3, lambda lines: lines[1]["chunks"].update(features=[7])),
    "a chunk of three": (3, lambda lines: lines[1]["chunks"].update(features=[[1, 2, 3]])),
    "a length in words": (3, lambda lines: lines[1]["chunks"].update(features=[["a", 1]])),
    "a negative length": (3, lambda lines: lines[1]["chunks"].update(features=[[-5, 1]])),
    "a length of nothing": (3, lambda lines: lines[1]["chunks"].update(features=[[0, 0]])),
    "a length beyond the file": (3, lambda lines: lines[1]["chunks"].update(features=[[10**9, 1]])),
    "a length of 10^30": (3, lambda lines: lines[1]["chunks"].update(features=[[10**30, 1]])),
    "a length that is no whole number": (
        3, lambda lines: lines[1]["chunks"].update(features=[[9.5, 1]])),
    "a checksum of 10^30": (
        3, lambda lines: lines[1]["chunks"]["features"][0].__setitem__(1, 10**30)),
    "another checksum": (3, lambda lines: lines[1]["chunks"]["features"][0].__setitem__(1, 7)),
    "no nonfinite": (3, lambda lines: lines[1].pop("nonfinite")),
    "nonfinite of an array it has not": (3, lambda lines: lines[1].update(nonfinite=["x"])),
    "nonfinite of nothing": (3, lambda lines: lines[1].update(nonfinite=None)),
    "next tokens of nothing": (1, lambda lines: lines[3].update(chunks=None)),
    "next tokens without a file": (1, lambda lines: lines[3]["chunks"].update(next_token=[])),
    "next tokens without an array": (1, lambda lines: lines[3]["chunks"].pop("next_token_text")),
    "next tokens elsewhere": (
        1, lambda lines: lines[3]["chunks"].update({"../../x": [[9, 9]]})),
    "next tokens that are a coordinate": (
        1, lambda lines: lines[3].update(chunks={"query": [[9, 9]]})),
    "next tokens of absurd size": (
        1, lambda lines: lines[3]["chunks"]["next_token"][0].__setitem__(0, 10**30)),
    "a checksum that is text": (
        1, lambda lines: lines[3]["chunks"]["next_token"][0].__setitem__(1, "a")),
    "next tokens twice": (1, lambda lines: lines.append(lines[3])),
    "a line of another kind": (1, lambda lines: lines.append({"versions": {"numpy": 1}})),
    "a line behind them of nothing": (1, lambda lines: lines.append({})),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("what", JOURNALS)
def test_invalid_line_ends_the_journal(staged: Path, what: str) -> None:
    again, change = JOURNALS[what]
    lines = hostile.journal_of(staged)
    change(lines)
    hostile.write_journal(staged, lines)
    begun = time.monotonic()
    assert len(goes_on(staged, readable=again < 3).written) == again
    assert time.monotonic() - begun < 30


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _extra_folder(file: Path) -> None:
    (file.parent / "extra").mkdir()


@pytest.mark.parametrize("change", [Path.unlink, _pipe, _folder, _extra_folder])
@pytest.mark.parametrize("file", ["journal", "query/c.0", "attention/c.0.0.0.0"])
def test_odd_files_of_a_staged_trace_restart_it(
    staged: Path, file: str, change: Callable[[Path], None]
) -> None:
    change(staged / file)
    goes_on(staged)


def test_missing_arrays_of_a_staged_trace_restart_it(staged: Path) -> None:
    for file in (staged / "features").iterdir():
        file.unlink()
    (staged / "features").rmdir()
    assert len(goes_on(staged).written) == 3


def test_configuration_of_a_run_is_any_json(tmp_path: Path) -> None:
    """Text in the configuration is never taken for the seal."""
    config = {"seal": "0" * 16, "nested": {"seal": "f" * 16, "text": '"seal": "' + "0" * 16}}
    run = fakes.make_run(tmp_path, config=config)
    assert read_run(run.path).attributes.config == config
    assert verify(run.path) == []
