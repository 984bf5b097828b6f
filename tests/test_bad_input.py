"""Careless or hostile input: one clear message, and nothing left behind.

Each case makes its input below a folder of its own and calls the command line in this process.
Whatever the case: exit code 1 or 2, a message that names the file and a remedy, no traceback,
nothing on stdout, nothing written, little time and memory. What is checked elsewhere by calling
functions (lines of scenario files, layer files of NPZ folders) is not repeated here.
"""

from __future__ import annotations

import bz2
import http.server
import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fakes
import hostile
import numpy as np
import pytest
from command_line import call
from fuzzing import METADATA, make_layout
from numcodecs import Zstd

from zarrtrace import demo

_SECONDS = 60
_BYTES = 600 * 2**20

Change = Callable[[Any], object]


class Case(NamedTuple):
    """An input, and the message that must come."""

    #: Makes the input below a folder; returns the command line.
    arrange: Callable[[Path], list[str]]
    #: What the message must mention.
    said: tuple[str, ...]
    code: int = 2
    #: Whether it needs torch, transformers and sae-lens.
    torch: bool = False


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file's kind and size by its path."""
    found = {}
    for file in sorted(folder.rglob("*")):
        status = file.lstat()
        found[str(file)] = (status.st_mode, 0 if file.is_dir() else status.st_size)
    return found


@contextmanager
def little_time_and_memory() -> Iterator[None]:
    """Fail if much of either is used."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def held(field: str) -> int:
        lines = status.read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

    measured = reset.exists()  # Linux
    if measured:
        reset.write_text("5", encoding="ascii")  # the peak is reset
        before = held("VmRSS")
    start = time.monotonic()
    yield
    assert time.monotonic() - start < _SECONDS
    if measured:
        assert held("VmHWM") - before < _BYTES


# --- scenario files ----------------------------------------------------------------------------


def suite(text: str | bytes, name: str = "suite.yaml") -> Callable[[Path], list[str]]:
    """Hand over a scenario file."""

    def arrange(folder: Path) -> list[str]:
        content = text.encode() if isinstance(text, str) else text
        (folder / name).write_bytes(content)
        return extract(folder, "--model", "demo", "--scenarios", str(folder / name))

    return arrange


def extract(folder: Path, *arguments: str) -> list[str]:
    return ["extract", "-o", str(folder / "run"), "--no-features", "--layers", "1", *arguments]


def entries(*changes: dict[str, Any]) -> Callable[[Path], list[str]]:
    """Hand over a JSONL file."""
    lines = [json.dumps({"name": f"a{i}", "prompt": "x", **c}) for i, c in enumerate(changes)]
    return suite("\n".join(lines), "suite.jsonl")


def _fifo(folder: Path) -> list[str]:
    os.mkfifo(folder / "suite.yaml")
    return extract(folder, "--model", "demo", "--scenarios", str(folder / "suite.yaml"))


def _huge_file(folder: Path) -> list[str]:
    with (folder / "suite.yaml").open("wb") as out:
        out.truncate(2**34)  # sparse: 16 GB that take no room
    return extract(folder, "--model", "demo", "--scenarios", str(folder / "suite.yaml"))


_SUITES: dict[str, Case] = {
    "tab for indentation": Case(suite("scenarios:\n\t- name: a\n"), ("suite.yaml:2", "YAML")),
    "nested 100,000 deep": Case(suite("[" * 100_000), ("suite.yaml", "nested")),
    "mappings nested deep": Case(suite("{a: " * 50_000), ("suite.yaml", "nested")),
    "date that is none": Case(suite("scenarios: 2001-99-99\n"), ("suite.yaml",)),
    "tag without a number": Case(suite("scenarios: !!int ''\n"), ("suite.yaml",)),
    "tag without a date": Case(suite("scenarios: !!timestamp x\n"), ("suite.yaml",)),
    "tag without a truth": Case(suite("scenarios: !!bool perhaps\n"), ("suite.yaml",)),
    "tag of Python": Case(suite("scenarios: !!python/name:os.system\n"), ("suite.yaml:1",)),
    "integer of 9,000 digits": Case(suite("scenarios: " + "9" * 9000), ("suite.yaml",)),
    "hexadecimal integer that has 9,000 digits": Case(
        suite(
            "template: '{a}'\nscenarios:\n- name: x\n  values: {a: 0x" + "f" * 9000 + "}\n",
        ),
        ("suite.yaml:3", "'a'"),
    ),
    "JSON integer of 9,000 digits": Case(
        suite('{"name": ' + "9" * 9000 + "}", "suite.jsonl"), ("suite.jsonl:1",)
    ),
    "two documents": Case(suite("scenarios: []\n---\nscenarios: []\n"), ("suite.yaml:2",)),
    "not UTF-8": Case(suite(b"scenarios:\n- name: \xff\n"), ("suite.yaml", "UTF-8")),
    "bytes of an archive": Case(suite(b"PK\x03\x04" + bytes(99)), ("suite.yaml",)),
    "control characters": Case(suite("scenarios:\n- name: a\x00\n"), ("suite.yaml",)),
    "unknown field": Case(
        entries({"promt": "x"}), ("suite.jsonl:1", "unknown field 'promt'", "'prompt'?")
    ),
    "unknown field of a span": Case(
        entries({"spans": {"goal": {"text": "x", "ocurrence": 1}}}), ("suite.jsonl:1", "ocurrence")
    ),
    "lone surrogate in a prompt": Case(entries({"prompt": "a\ud800"}), ("suite.jsonl:1",)),
    "lone surrogate in a YAML escape": Case(
        suite('scenarios:\n- name: a\n  prompt: "\\ud800"\n'), ("suite.yaml",)
    ),
    "lone surrogate in a name": Case(entries({"name": "\ud800"}), ("suite.jsonl:1",)),
    "lone surrogate in a field": Case(entries({"\ud800": 1}), ("suite.jsonl:1",)),
    "lone surrogate in an option": Case(entries({"options": {"a": "\udfff"}}), ("suite.jsonl:1",)),
    "names that differ in case": Case(
        entries({"name": "Same"}, {"name": "sAME"}), ("suite.jsonl:2", "Rename")
    ),
    "names that differ in Unicode form": Case(
        entries({"name": "ﬁrst"}, {"name": "first"}), ("suite.jsonl:2", "Rename")
    ),
    "name that is not in normal form": Case(
        entries({"name": "e\u0301t\u00e9"}), ("suite.jsonl:1", "not safe")
    ),
    "name that leaves its folder": Case(entries({"name": "a/../../b"}), ("suite.jsonl:1", "safe")),
    "name of 10 MB": Case(entries({"name": "a" * 10**7}), ("suite.jsonl:1", "longer than")),
    "span beyond the prompt": Case(
        entries({"spans": {"goal": [0, 99]}}), ("suite.jsonl:1", "goal", "1 characters")
    ),
    "span that ends before it begins": Case(
        entries({"prompt": "abc", "spans": {"goal": [2, 1]}}), ("suite.jsonl:1", "start < end")
    ),
    "span of text that stands twice": Case(
        entries({"prompt": "9 of 9", "spans": {"goal": "9"}}), ("suite.jsonl:1", "2 times")
    ),
    "span of absurd numbers": Case(
        entries({"spans": {"goal": [0, 10**30]}}), ("suite.jsonl:1", "goal")
    ),
    "span that is called decision": Case(
        entries({"spans": {"decision": "x"}}), ("suite.jsonl:1", "always the last token")
    ),
    "marks that overlap": Case(
        entries({"prompt": None, "template": "[[a:x [[b:y]] z]]"}), ("suite.jsonl:1", "nest")
    ),
    "pipe": Case(_fifo, ("suite.yaml", "file")),
    "endless device": Case(
        lambda folder: extract(folder, "--model", "demo", "--scenarios", "/dev/zero"),
        ("/dev/zero",),
    ),
    "16 GB": Case(_huge_file, ("suite.yaml", "larger")),
    "prompt of 10 MB": Case(
        entries({"prompt": "Stop the loss. " * 700_000}), ("a0", "characters"), torch=True
    ),
}

# --- command lines -----------------------------------------------------------------------------


def line(*arguments: str) -> Callable[[Path], list[str]]:
    """Hand over arguments; FOLDER stands for the case's own."""
    return lambda folder: [argument.replace("FOLDER", str(folder)) for argument in arguments]


_LINES: dict[str, Case] = {
    "unknown command": Case(line("exract"), ("Did you mean 'extract'?",)),
    "unknown option": Case(line("extract", "--laywers", "1"), ("--layers",)),
    "no output": Case(line("extract"), ("--output",)),
    "output of a variable that is not set": Case(
        line("export", "FOLDER", "-o", ""), ("--output", "empty")
    ),
    "layer that is no number": Case(
        line("extract", "-o", "FOLDER/run", "--layers", "first"), ("'first'", "1-31")
    ),
    "layers in the wrong order": Case(
        line("extract", "-o", "FOLDER/run", "--layers", "9-3"), ("'9-3'",)
    ),
    "negative layer": Case(line("extract", "-o", "FOLDER/run", "--layers=-1"), ("'-1'",)),
    "absurd layer": Case(
        line("extract", "-o", "FOLDER/run", "--layers", "1-1000000000000"), ("1000000000000",)
    ),
    "superscript layer": Case(line("extract", "-o", "FOLDER/run", "--layers", "²"), ("'²'",)),
    "layers twice": Case(
        line("extract", "-o", "FOLDER/run", "--layers", "1", "--layer-start", "1"),
        ("both choose layers",),
    ),
    "unknown precision": Case(
        line("extract", "-o", "FOLDER/run", "--dtype", "int4"), ("float32", "bfloat16")
    ),
    "batch of nothing": Case(line("extract", "-o", "FOLDER/run", "--batch-size", "0"), ("x>=1",)),
    "resolution in words": Case(
        line("figures", "FOLDER", "-o", "FOLDER/figures", "--dpi", "fine"), ("'fine'", "--dpi")
    ),
    "table of an unknown kind": Case(
        line("analyze", "decision", "FOLDER", "-o", "FOLDER/x.xls"), (".csv",)
    ),
    "run that is not there": Case(line("info", "FOLDER/nope"), ("nope", "path"), code=1),
    "folder that is no run": Case(line("verify", "FOLDER"), ("not a zarrtrace",), code=1),
    "layer beyond the model": Case(
        line("extract", "-o", "FOLDER/run", "--layers", "1,32"), ("--layers 32", "31"), torch=True
    ),
    "position that no prompt has": Case(
        line("extract", "-o", "FOLDER/run", "--layers", "1", "--positions", "100000"),
        ("--positions 100000", "tokens"),
        torch=True,
    ),
    "port beyond the last": Case(
        line("view", "FOLDER", "--no-browser", "--port", "99999"),
        ("99999", "--port"),
    ),
    "device of an unknown kind": Case(
        line("extract", "-o", "FOLDER/run", "--device", "toaster"),
        ("--device toaster",),
        torch=True,
    ),
}

# --- stores ------------------------------------------------------------------------------------


def store(change: Callable[[Path], object], *command: str) -> Callable[[Path], list[str]]:
    """Hand over a run of which something was changed; `change` gets a trace's folder."""

    def arrange(folder: Path) -> list[str]:
        run = fakes.make_run(folder)
        change(run.trace)
        if command:
            return [argument.replace("FOLDER", str(folder)) for argument in command]
        return ["export", str(run.path), "-o", str(folder / "npz")]

    return arrange


def rewrite(file: Path, change: Change) -> None:
    """Change a JSON file."""
    found = json.loads(file.read_bytes())
    change(found)
    file.write_text(json.dumps(found), encoding="utf-8")


def attributes(change: Change, *, of_run: bool = False) -> Callable[[Path], None]:
    """Change attributes as an attacker would: the seal fits again."""

    def act(trace: Path) -> None:
        folder = trace.parent if of_run else trace
        hostile.change_group(folder, lambda group: change(group["attributes"]))

    return act


def array(name: str, change: Change) -> Callable[[Path], None]:
    """Change an array's metadata likewise."""
    return lambda trace: hostile.change_array(trace, name, change)


def raw(content: bytes, file: str = "zarr.json") -> Callable[[Path], int]:
    """Replace a file of the trace."""
    return lambda trace: (trace / file).write_bytes(content)


_set = hostile.setting


def _grid(shape: Any) -> Change:
    return _set("chunk_grid", "configuration", "chunk_shape", shape)


def _pipe_for_metadata(trace: Path) -> None:
    (trace / "zarr.json").unlink()
    os.mkfifo(trace / "zarr.json")


def _pipe_for_a_file(trace: Path) -> None:
    (trace / "features" / "c.0.0.0").unlink()
    os.mkfifo(trace / "features" / "c.0.0.0")


def _folder_for_metadata(trace: Path) -> None:
    (trace / "zarr.json").unlink()
    (trace / "zarr.json").mkdir()


def _huge_metadata(trace: Path) -> None:
    with (trace / "zarr.json").open("r+b") as out:
        out.truncate(2**36)  # sparse: 64 GB that take no room


def chunk(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    """Replace a coordinate's chunk, and its checksum so that it fits."""
    return lambda trace: hostile.replace_chunk(trace, name, content())


def _zstd_bomb() -> bytes:
    return bytes(Zstd(level=1).encode(bytes(2**30)))


def _one_giant_chunk(trace: Path) -> None:
    """Let the trace be as long as a chunk of its features claims: 10 GB."""

    def change(node: Any) -> None:
        tokens = 10**10 // 64
        node["shape"][1] = tokens
        node["chunk_grid"]["configuration"]["chunk_shape"] = [3, tokens, 16]
        node["codecs"][0]["configuration"]["chunk_shape"] = [1, tokens, 16]

    hostile.change_array(trace, "features", change)


_STORES: dict[str, Case] = {
    name: case._replace(code=1)
    for name, case in {
        "shape of 10^18": Case(
            store(array("query", _set("shape", [10**18]))), ("Safe_1/zarr.json", "query", "shape")
        ),
        "shape of 10^9, no chunks": Case(
            store(
                array(
                    "query",
                    lambda m: (
                        _set("shape", [10**9])(m),
                        _grid([10**9])(m),
                        _set("attributes", "checksums", {})(m),
                    ),
                )
            ),
            ("Safe_1/zarr.json", "query", "8000000000 bytes"),
        ),
        "more files than there can be": Case(
            store(array("features", _set("shape", [3, 10**18, 16]))), ("features", "shape")
        ),
        "chunk of 10 GB": Case(store(_one_giant_chunk), ("features", "10000000000 bytes")),
        "negative shape": Case(
            store(array("features", _set("shape", [3, -7, 16]))), ("features", "-7")
        ),
        "chunks of nothing": Case(store(array("features", _grid([1, 0, 16]))), ("features", "0")),
        "negative chunks": Case(store(array("features", _grid([-1, -7, -16]))), ("features", "-1")),
        "chunks of fewer dimensions": Case(store(array("features", _grid([1]))), ("features",)),
        "infinite shape": Case(
            store(array("features", _set("shape", [float("inf"), 7, 16]))), ("Infinity",)
        ),
        "shape in words": Case(
            store(array("features", _set("shape", "large"))), ("features", "'large'")
        ),
        "other dimensions": Case(
            store(array("features", _set("dimension_names", ["layer", "query", "query"]))),
            ("features", "dimensions"),
        ),
        "no dimensions": Case(
            store(array("features", _set("dimension_names", None))), ("features", "dimensions")
        ),
        "dimensions that are no text": Case(
            store(array("features", _set("dimension_names", [["a"], {}, 3]))), ("features",)
        ),
        "dimension of another size": Case(
            store(array("key", lambda m: (_set("shape", [6])(m), _grid([6])(m)))), ("along key",)
        ),
        "unknown codec": Case(
            store(array("features", _set("codecs", 0, {"name": "from_the_future"}))), ("features",)
        ),
        "codecs that are none": Case(store(array("features", _set("codecs", 7))), ("features",)),
        "no checksums in chunks": Case(
            store(array("features", lambda m: m["codecs"][0]["configuration"]["codecs"].pop())),
            ("features", "codecs"),
        ),
        "scaled numbers": Case(
            store(array("features", _set("attributes", "scale_factor", 2))), ("scale_factor",)
        ),
        "unknown type of numbers": Case(
            store(array("features", _set("data_type", "quaternion"))), ("features", "quaternion")
        ),
        "pickled objects": Case(
            store(array("features", _set("data_type", {"name": "object"}))), ("features", "object")
        ),
        "file of a length in words": Case(
            store(array("features", _set("attributes", "checksums", "c.0.0.0", 0, "long"))),
            ("features", "c.0.0.0"),
        ),
        "file that cannot be": Case(
            store(array("features", _set("attributes", "checksums", "c.9.9.9", [1, "0" * 16]))),
            ("features", "c.9.9.9"),
        ),
        "file outside the trace": Case(
            store(array("features", _set("attributes", "checksums", "../../x", [1, "0" * 16]))),
            ("features", "../../x"),
        ),
        "label that is missing": Case(
            store(array("key_token", _set("attributes", "checksums", {}))), ("key_token",)
        ),
        "array outside the trace": Case(
            store(
                lambda trace: hostile.change_group(
                    trace,
                    _set("consolidated_metadata", "metadata", "../../x", {}),
                )
            ),
            ("../../x",),
        ),
        "array that is a list": Case(
            store(
                lambda trace: hostile.change_group(
                    trace, _set("consolidated_metadata", "metadata", "features", [1])
                )
            ),
            ("Safe_1/zarr.json",),
        ),
        "no consolidated metadata": Case(
            store(lambda trace: hostile.change_group(trace, _set("consolidated_metadata", None))),
            ("Safe_1/zarr.json", "consolidated"),
        ),
        "folder in the run that is not there": Case(
            store(lambda _: None, "export", "FOLDER/run/nope", "-o", "FOLDER/o"), ("nope",)
        ),
        "gigabyte of text in a chunk": Case(store(chunk("key_token", _zstd_bomb)), ("claims",)),
        "gigabyte of numbers in a chunk": Case(store(chunk("token_id", _zstd_bomb)), ("claims",)),
        "chunk that claims an exabyte": Case(
            store(chunk("token_id", lambda: b"(\xb5/\xfd\xe4" + b"\xff" * 7 + b"\x0f" + bytes(9))),
            ("claims",),
        ),
        "pipe for metadata": Case(store(_pipe_for_metadata), ("Safe_1/zarr.json", "regular")),
        "pipe for a file": Case(store(_pipe_for_a_file), ("features/c.0.0.0", "regular")),
        "folder for metadata": Case(store(_folder_for_metadata), ("zarr.json",)),
        "metadata of 64 GB": Case(store(_huge_metadata), ("zarr.json", "bytes")),
        "group nested deep": Case(store(raw(b'{"a":' * 100_000)), ("zarr.json",)),
        "group that is a list": Case(store(raw(b"[1, 2]")), ("zarr.json",)),
        "group of bytes": Case(store(raw(b"\xff\xfe\x00")), ("zarr.json",)),
        "group without attributes": Case(store(raw(b'{"attributes": null}')), ("zarr.json",)),
        "number of 9,000 digits": Case(
            store(raw(b'{"attributes": ' + b"9" * 9000 + b"}")), ("zarr.json",)
        ),
        "seal of something else": Case(
            store(lambda t: rewrite(t / "zarr.json", _set("attributes", "prompt", "Stop."))),
            ("zarr.json", "not the metadata that was written"),
        ),
        "coordinates that are a number": Case(
            store(attributes(_set("coordinates", 3))), ("zarr.json",)
        ),
        "unknown attribute": Case(
            store(attributes(_set("scenaro", "x"))), ("zarr.json", "attribute scenaro")
        ),
        "attribute of another type": Case(
            store(attributes(_set("spans", "1-3"))), ("zarr.json", "attribute spans")
        ),
        "negative layers": Case(store(attributes(_set("layers", "-1"))), ("attribute layers",)),
        "layers of a thousand million": Case(
            store(attributes(_set("layers", "0-999999999"))), ("attribute layers",)
        ),
        "layer that is there twice": Case(
            store(attributes(_set("layers", "1,1,2"))), ("attribute layers", "twice")
        ),
        "layer in superscript": Case(store(attributes(_set("layers", "²"))), ("attribute layers",)),
        "more layers than there are": Case(store(attributes(_set("layers", "1-4"))), ("layer",)),
        "span beyond the prompt": Case(
            store(attributes(_set("spans", "goal", {"characters": [], "tokens": [3, 5000]}))),
            ("'goal'", "beyond"),
        ),
        "scenario outside the run": Case(
            store(attributes(_set("scenarios", ["../../etc"]), of_run=True)),
            ("run/zarr.json", "../../etc"),
        ),
        "trace of another scenario": Case(
            store(attributes(_set("scenario", "Risky_2"))), ("Safe_1", "Risky_2")
        ),
        "format of the future": Case(
            store(attributes(_set("format_version", 10**30))), ("Safe_1", "newer zarrtrace")
        ),
        "format of the past": Case(
            store(attributes(_set("zarrtrace", {"format_version": 1}))), ("Safe_1", "version 1")
        ),
        "format in words": Case(
            store(attributes(_set("format_version", "two"))), ("attribute format_version",)
        ),
        "kind that is none": Case(store(attributes(_set("kind", ["run"]))), ("attribute kind",)),
    }.items()
}

# --- NPZ folders -------------------------------------------------------------------------------


def npz(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """Hand over a folder of NPZ files of which something was changed."""

    def arrange(folder: Path) -> list[str]:
        layout = folder / "npz"
        make_layout(layout)
        change(layout)
        return ["import", str(layout), "-o", str(folder / "run")]

    return arrange


def member(content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Callable[[Path], None]:
    """Replace a layer's array by bytes."""

    def act(layout: Path) -> None:
        with zipfile.ZipFile(layout / "a" / "layer_2.npz", "w", compression) as archive:
            archive.writestr("features.npy", content)

    return act


def npy(header: bytes, version: bytes = b"\x01\x00") -> bytes:
    """Return an array whose header is what is given."""
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + header + bytes(48)


def _burst_of_bzip2(layout: Path) -> None:
    """Replace an array by a gigabyte of zeros: its first kilobyte holds them all."""
    # As bz2.compress makes it, which takes a core eight seconds: 24 times the block that holds
    # 45,899,235 zeros, its checksum after its mark; then their joint checksum, after the last mark.
    block = "3141592653590e09e2df015f8e4000c0000008200030804d4642a025a90a8097"
    joint = 0
    for _ in range(24):
        joint = (joint << 1 | joint >> 31) & 0xFFFFFFFF ^ int(block[12:20], 16)
    content = bytes.fromhex(f"425a6839{block * 24}177245385090{joint:08x}")
    assert bz2.BZ2Decompressor().decompress(content, 2**20) == bytes(2**20)
    file = layout / "a" / "layer_2.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("features.npy", content)
    found = bytearray(file.read_bytes())
    found[8:10] = b"\x0c\0"  # bzip2, in both headers
    at = found.index(b"PK\1\2") + 10
    found[at : at + 2] = b"\x0c\0"
    file.write_bytes(found)


def _long_header(layout: Path) -> None:
    """Let a header of format 2 claim a gigabyte, all of it spaces that compress well."""
    header = (2**30).to_bytes(4, "little")
    with (
        zipfile.ZipFile(
            layout / "a" / "layer_2.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1
        ) as archive,
        archive.open("features.npy", "w", force_zip64=True) as out,
    ):
        out.write(b"\x93NUMPY\x02\x00" + header)
        for _ in range(64):
            out.write(b" " * 2**24)


def _metadata(change: Change) -> Callable[[Path], None]:
    return lambda layout: rewrite(layout / METADATA, change)


def _pipe_for_the_layout(layout: Path) -> None:
    (layout / METADATA).unlink()
    os.mkfifo(layout / METADATA)


def _link_to_metadata(layout: Path) -> None:
    file = layout / METADATA
    file.rename(layout.parent / "elsewhere.json")
    file.symlink_to(layout.parent / "elsewhere.json")


def _many_scenarios(found: dict[str, Any]) -> None:
    (first,) = found["scenarios"]
    found["scenarios"] = [{**first, "scenario": f"a{i}"} for i in range(20_000)]
    found["n_scenarios"] = 20_000
    found["layer_range"] = [0, 9_000]


_NPZ: dict[str, Case] = {
    name: Case(npz(change), said, code=1)
    for name, (change, said) in {
        "header nested deep": (member(npy(b"(" * 9000)), ("layer_2.npz",)),
        "header that never ends": (member(npy(b"{'descr': '''")), ("layer_2.npz",)),
        "header that calls": (member(npy(b"print('gotcha')")), ("layer_2.npz",)),
        "header of odd keys": (member(npy(b"{1: 2, None: 3}")), ("layer_2.npz",)),
        "header with an odd type": (
            member(npy(b"{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (3, 4)}")),
            ("layer_2.npz",),
        ),
        "header with a type that is none": (
            member(npy(b"{'descr': {}, 'fortran_order': False, 'shape': (3, 4)}")),
            ("layer_2.npz",),
        ),
        "header of bytes": (member(npy(bytes(range(128, 256)))), ("layer_2.npz",)),
        "negative shape": (
            member(npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, -4)}")),
            ("layer_2.npz", "shape"),
        ),
        "header of a gigabyte": (_long_header, ("layer_2.npz",)),
        "burst of bzip2": (_burst_of_bzip2, ("layer_2.npz",)),
        "bzip2": (member(npy(b"{}"), zipfile.ZIP_BZIP2), ("layer_2.npz", "compress")),
        "lzma": (member(npy(b"{}"), zipfile.ZIP_LZMA), ("layer_2.npz", "compress")),
        "archive of random bytes": (
            lambda f: (f / "a" / "layer_2.npz").write_bytes(np.random.default_rng(0).bytes(999)),
            ("layer_2.npz",),
        ),
        "plain .npy": (
            lambda f: (f / "a" / "layer_2.npz").write_bytes(npy(b"{}")),
            ("layer_2.npz",),
        ),
        "metadata that is a pipe": (_pipe_for_the_layout, (METADATA,)),
        "metadata behind a link": (_link_to_metadata, (METADATA, "leads out")),
        "metadata that is a folder": (
            lambda f: ((f / METADATA).unlink(), (f / METADATA).mkdir()),
            (METADATA,),
        ),
        "180 million files": (_metadata(_many_scenarios), ("missing", "layer_0.npz")),
        "layers of a billion": (
            _metadata(_set("layer_range", [0, 10**9])),
            (METADATA, "layer_range"),
        ),
        "scenario of the device kind": (
            _metadata(_set("scenarios", 0, "scenario", "con")),
            (METADATA, "'con'"),
        ),
    }.items()
}

# --- SAE and model folders ---------------------------------------------------------------------

_SAE = "blocks.1.hook_resid_post"


def sae(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """Hand over a folder with an SAE of which something was changed."""

    def arrange(folder: Path) -> list[str]:
        shutil.copytree(demo.sae_path() / _SAE, folder / "saes" / _SAE)
        change(folder / "saes" / _SAE)
        chosen = ["--layers", "1", "--scenario", "Risky_40"]
        return ["extract", "-o", str(folder / "run"), "--sae-path", str(folder / "saes"), *chosen]

    return arrange


def config(change: Change) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "cfg.json", change)


def weights(content: bytes) -> Callable[[Path], int]:
    return lambda folder: (folder / "sae_weights.safetensors").write_bytes(content)


_SAES: dict[str, Case] = {
    name: Case(sae(change), said, code=1, torch=True)
    for name, (change, said) in {
        "configuration that is a list": (raw(b"[]", "cfg.json"), ("cfg.json",)),
        "configuration nested deep": (raw(b"[" * 100_000, "cfg.json"), ("cfg.json",)),
        "configuration not UTF-8": (raw(b"\xff", "cfg.json"), ("cfg.json",)),
        "metadata that is text": (config(_set("metadata", "none")), (_SAE, "metadata")),
        "hook point of 9,000 digits": (
            config(_set("metadata", "hook_name", f"blocks.{'9' * 9000}.hook_resid_post")),
            ("hook",),
        ),
        "features of 10^18": (config(_set("d_sae", 10**18)), (_SAE, "d_sae")),
        "prepend_bos in words": (
            config(lambda c: c["metadata"].update(prepend_bos=["yes"])),
            (_SAE, "prepend_bos", "true or false"),
        ),
        "negative width": (config(_set("d_sae", -1)), (_SAE, "d_sae")),
        "width in words": (config(_set("d_in", "wide")), (_SAE, "d_in")),
        "unknown architecture": (config(_set("architecture", "from_the_future")), (_SAE,)),
        "weights that are pickled": (weights(b"\x80\x04\x95" + bytes(99)), (_SAE,)),
        "weights cut short": (
            lambda f: os.truncate(f / "sae_weights.safetensors", 1000),
            (_SAE,),
        ),
        "weights that claim more": (
            weights((2**62).to_bytes(8, "little") + b"{}"),
            (_SAE,),
        ),
        "no weights": (weights(b""), (_SAE,)),
    }.items()
}


def model(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """Hand over a model's folder of which something was changed."""

    def arrange(folder: Path) -> list[str]:
        shutil.copytree(demo.model_path(), folder / "model")
        change(folder / "model")
        chosen = ["--scenarios", "slot-machine", "--scenario", "Risky_40"]
        return extract(folder, "--model", str(folder / "model"), *chosen)

    return arrange


def _code_of_its_own(folder: Path) -> None:
    """Have the configuration ask for code in the folder."""
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(folder.parent / 'ran')!r}).touch()\n"
    )
    rewrite(
        folder / "config.json",
        lambda c: (
            c.update(auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
            c.update(model_type="own"),
        ),
    )


_MODELS: dict[str, Case] = {
    name: Case(model(change), ("model", *said), code=1, torch=True)
    for name, (change, said) in {
        "configuration that is no JSON": (raw(b"{", "config.json"), ("config.json",)),
        "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ()),
        "code of its own": (_code_of_its_own, ()),
    }.items()
}

# --- the table ---------------------------------------------------------------------------------

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {
        "scenarios": _SUITES,
        "line": _LINES,
        "store": _STORES,
        "npz": _NPZ,
        "sae": _SAES,
        "model": _MODELS,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.torch] if case.torch else [])
        for name, case in CASES.items()
    ],
)
def test_one_clear_message(case: Case, tmp_path: Path) -> None:
    arguments = case.arrange(tmp_path)
    before = contents(tmp_path)
    with little_time_and_memory():
        done = call(*arguments)
    assert done.returncode == case.code, done.stderr
    for words in case.said:
        assert words in done.stderr
    what, *more = done.stderr.strip().splitlines()
    if done.stderr.startswith("Usage: "):
        assert more[-1].startswith("Error: ")
    else:
        if what.endswith("loading torch and transformers …"):
            what, *more = more
        assert what.startswith("zarrtrace: error: ")
        assert 1 <= len(more) <= 2  # why, and the remedy
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 4000
    assert not done.stdout
    assert contents(tmp_path) == before


# --- secrets -----------------------------------------------------------------------------------

_TOKEN = "hf_ThisIsASecretOfNobodyAtAll0123456789"  # noqa: S105 -- none


class _Hub(http.server.BaseHTTPRequestHandler):
    """A model hub that refuses everybody, and repeats what it was given."""

    given: list[str]

    def do_HEAD(self) -> None:
        secret = self.headers.get("Authorization", "")
        self.given.append(secret)
        self.send_response(403)
        self.send_header("X-Error-Message", f"{secret} may not read this")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815 -- http.server's name

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """A hub on this machine that asks for a token, which the environment holds."""
    _Hub.given = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_TOKEN", _TOKEN)
        for proxy in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(proxy, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield _Hub
        server.shutdown()
        thread.join()


@pytest.mark.torch
def test_a_token_never_stands_in_an_error(hub: type[_Hub], tmp_path: Path) -> None:
    arguments = extract(tmp_path, "--model", "nobody/secret-model", "--scenarios", "slot-machine")
    done = call(*arguments)
    assert any(_TOKEN in given for given in hub.given)  # it was sent, and came back
    assert done.returncode == 1
    assert _TOKEN not in done.stderr + done.stdout
    assert not contents(tmp_path)


@pytest.mark.torch
def test_a_token_never_stands_in_a_store_or_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", _TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", _TOKEN)
    caplog.set_level("DEBUG")
    arguments = ["extract", "-o", str(tmp_path / "run"), "--layers", "1", "--scenario", "Risky_40"]
    done = call(*arguments)
    assert done.returncode == 0
    assert _TOKEN not in done.stdout + done.stderr + caplog.text
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if _TOKEN.encode() in file.read_bytes()]
