"""``schema/`` is what the code generates, is valid, and tells right from wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import fakes
import google_crc32c
import numpy as np
import pytest
import yaml
from jsonschema import Draft202012Validator
from sample_tables import plan_of, values_of, write_table

from zarrtrace import demo, schemas
from zarrtrace.format.index_layout import index_layout
from zarrtrace.format.layout import trace_layout
from zarrtrace.index import build_index
from zarrtrace.scenarios import load_suite

FOLDER = Path(__file__).parents[1] / "schema"
#: Names that only runs with generated tokens have.
GENERATED = ("generated", "repeat", "choice", "SCENARIO~REPEAT")
SCHEMAS = sorted(path.name for path in FOLDER.glob("*.schema.json"))


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((FOLDER / name).read_text(encoding="utf-8")))


def attributes(path: Path) -> dict[str, Any]:
    """Return a group's attributes without the names of coordinates, which are xarray's."""
    content = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = content["attributes"]
    return {name: value for name, value in found.items() if name != "coordinates"}


def test_schema_folder_is_what_the_code_generates() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    assert found == schemas.generate(), "run 'python -m zarrtrace.schemas' and commit schema/"


def test_main_writes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    schemas.main()
    written = {path.name: path.read_text("utf-8") for path in (tmp_path / "schema").iterdir()}
    assert written == schemas.generate()


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_valid_json_schema(name: str) -> None:
    Draft202012Validator.check_schema(json.loads((FOLDER / name).read_text(encoding="utf-8")))


def test_embedded_suite_is_valid() -> None:
    suite = yaml.safe_load(demo.suite_path().read_text(encoding="utf-8"))
    validator("scenarios.schema.json").validate(suite)
    for entry in suite["scenarios"]:
        validator("scenario-entry.schema.json").validate(entry)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"scenarios": []},
        {"scenarios": [{"name": 5, "prompt": "x"}]},
        {"scenarios": [{"prompt": "x", "metadata": {"layer": 1}}]},
        {"scenarios": [{"prompt": "x", "metadata": {"a b": 1}}]},
        {"scenarios": [{"prompt": "x", "metadata": {"a": [1]}}]},
        {"scenarios": [{"prompt": "x", "outcome": "lost"}]},
        {"scenarios": [{"name": "a", "prmpt": "x"}]},
        {"scenarios": [{"name": "a", "prompt": "x", "spans": {"s": {"occurrence": 1}}}]},
        {"scenarios": [{"name": "a", "prompt": "x", "spans": {"a b": "x"}}]},
        {"scenarios": [{"name": "a", "prompt": "x", "spans": {"s": [0, -1]}}]},
        {"scenarios": [{"name": "a", "prompt": "x"}], "defualts": {}},
    ],
)
def test_wrong_suites_are_invalid(wrong: dict[str, Any]) -> None:
    assert not validator("scenarios.schema.json").is_valid(wrong)


def test_prose_names_every_array_and_its_example_works(tmp_path: Path) -> None:
    prose = (FOLDER / "README.md").read_text(encoding="utf-8")
    names = [*trace_layout(fakes.make_shape()), *index_layout(1, {"features": 8}, 1), *GENERATED]
    assert [name for name in names if f"`{name}" not in prose] == []
    example = tmp_path / "example.yaml"
    example.write_text(prose.split("```yaml")[1].split("```")[0], encoding="utf-8")
    _, own = load_suite(example)
    assert {name: [own.prompt[a:b] for a, b in found] for name, found in own.spans.items()} == {
        "balance": ["$10"],
        "bet": ["10"],
        "choices": ["Bet", "stop"],
    }


def test_a_real_run_is_valid(shared_run: fakes.FakeRun) -> None:
    validator("run.schema.json").validate(attributes(shared_run.path))
    for scenario in shared_run.truth:
        validator("trace.schema.json").validate(attributes(shared_run.path / scenario))


def test_index_of_a_real_run_is_valid(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    build_index(run.path)
    validator("index.schema.json").validate(attributes(run.path / "index"))


def test_a_real_table_is_valid(tmp_path: Path) -> None:
    plan = plan_of(20)
    write_table(tmp_path / "run", plan, values_of(3, 20, 300, 12))
    good = attributes(tmp_path / "run")
    validator("table.schema.json").validate(good)
    for wrong in ({"kind": "run"}, {"failed": ["s1"]}, {"metadata": ["a b"]}, {"colour": "red"}):
        assert not validator("table.schema.json").is_valid({**good, **wrong})


def test_the_example_is_valid() -> None:
    example = json.loads((FOLDER / "example-trace.zarr.json").read_text(encoding="utf-8"))
    del example["attributes"]["coordinates"]
    validator("trace.schema.json").validate(example["attributes"])


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ("format_version", 1),
        ("kind", "run"),
        ("scenario", None),
        ("layers", ["one"]),
        ("spans", {"balance": {"tokens": [1]}}),
        ("layers", "1-2,"),
        ("saes", {"features": {"release": None}}),
        ("nonfinite", {"attention": [1, 2]}),
        ("seal", "short"),
        ("colour", "red"),
    ],
)
def test_wrong_trace_attributes_are_invalid(
    shared_run: fakes.FakeRun, where: str, wrong: Any
) -> None:
    good = attributes(shared_run.trace)
    bad = copy.deepcopy(good) | {where: wrong}
    assert validator("trace.schema.json").is_valid(good)
    assert not validator("trace.schema.json").is_valid(bad)


def test_wrong_run_attributes_are_invalid(shared_run: fakes.FakeRun) -> None:
    good = attributes(shared_run.path)
    assert not validator("run.schema.json").is_valid({**good, "scenarios": "all"})
    del good["config"]
    assert not validator("run.schema.json").is_valid(good)


# --- the prose, by a second reader -------------------------------------------------------------


def crc32c_of(data: bytes) -> int:
    return int(google_crc32c.value(data))


def test_seal_is_what_the_prose_says(shared_run: fakes.FakeRun) -> None:
    for folder in (shared_run.path, shared_run.trace):
        content = (folder / "zarr.json").read_bytes()
        seal = json.loads(content)["attributes"]["seal"]
        blank = content.replace(f'"seal": "{seal}"'.encode(), b'"seal": "' + b"0" * 16 + b'"', 1)
        assert hashlib.blake2b(blank, digest_size=8).hexdigest() == seal


def test_files_end_and_are_named_as_the_prose_says(shared_run: fakes.FakeRun) -> None:
    there = {file.parent.name: file for file in shared_run.trace.glob("*/c.*")}
    for name, file in there.items():
        node = json.loads((file.parent / "zarr.json").read_text(encoding="utf-8"))
        content = file.read_bytes()
        size, checksum = node["attributes"]["checksums"][file.name]
        assert size == len(content)
        if node["codecs"][0]["name"] != "sharding_indexed":
            assert int(checksum, 16) == int.from_bytes(content[-4:], "little"), name
            assert int(checksum, 16) == crc32c_of(content[:-4]), name
            continue
        outer = node["chunk_grid"]["configuration"]["chunk_shape"]
        inner = node["codecs"][0]["configuration"]["chunk_shape"]
        count = math.prod(a // b for a, b in zip(outer, inner, strict=True))
        index = content[-4 - 16 * count : -4]
        assert crc32c_of(index) == int.from_bytes(content[-4:], "little"), name
        end, crcs = 0, b""
        for offset, length in np.frombuffer(index, "<u8").reshape(-1, 2).tolist():
            if offset == 2**64 - 1:
                continue
            assert offset == end, "chunks stand in order, with nothing between"
            end += length
            assert crc32c_of(content[offset : end - 4]) == int.from_bytes(
                content[end - 4 : end], "little"
            )
            crcs += content[end - 4 : end]
        mark = hashlib.blake2b(crcs, digest_size=8).digest()
        assert content[end:] == mark + index + content[-4:], name
        assert checksum == mark.hex(), name


def test_trace_of_a_short_prompt_has_the_files_that_the_prose_counts(tmp_path: Path) -> None:
    trace = fakes.make_run(
        tmp_path, scenarios=("a",), layers=range(1, 32), tokens=300, features=512
    ).trace
    found = [*trace.rglob("*")]
    files, folders = [p for p in found if p.is_file()], [trace, *(p for p in found if p.is_dir())]
    prose = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"is {len(files)} files in {len(folders)} folders" in prose


@pytest.mark.parametrize("tokens", [7, 150, 300, 600, 1100])
def test_chunks_are_those_of_the_table(tokens: int) -> None:
    layout = trace_layout(fakes.make_shape(tokens=tokens, heads=32, features=32_768))
    q = min(tokens, {7: 32, 150: 32, 300: 16, 600: 8, 1100: 4}[tokens])
    keys = min(tokens, 1024)
    assert layout["attention"].chunks == (1, 32, q, keys)
    assert layout["attention_mean"].chunks == (1, min(tokens, 8 * q), keys)
    few = trace_layout(fakes.make_shape(tokens=tokens, heads=8))
    assert few["attention"].chunks == (1, 8, min(tokens, 32 if tokens <= 600 else 16), keys)
    assert layout["features"].chunks == (1, min(tokens, 64), 4096)
    assert layout["top_feature"].chunks == (1, min(tokens, 512), 32)
    for one in layout.values():
        if one.shards is not None:
            itemsize = np.dtype(one.dtype).itemsize
            assert math.prod(one.shards) * itemsize <= 2**29


def test_chunks_of_what_is_small_hold_no_more_rows_than_64_mib_of_what_is_large() -> None:
    layout = trace_layout(fakes.make_shape(tokens=40_000, heads=32, features=2**17))
    row = 32 * 40_000 * 4
    assert layout["attention_mean"].chunks[1] == 2**26 // (4 * row) * 4 == 12
    assert layout["top_feature"].chunks[1] == 2**26 // (2**17 * 4) == 128
