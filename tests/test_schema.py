"""``schema/`` is what the code generates, is valid, and tells right from wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import fakes
import pytest
import yaml
from jsonschema import Draft202012Validator

from zarrtrace import demo, schemas
from zarrtrace.format.layout import trace_layout
from zarrtrace.scenarios import load_suite

FOLDER = Path(__file__).parents[1] / "schema"
SCHEMAS = sorted(path.name for path in FOLDER.glob("*.schema.json"))


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((FOLDER / name).read_text(encoding="utf-8")))


def attributes(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    return found["attributes"][NAMESPACE]


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
        {"scenarios": [{"prompt": "x"}]},
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
    for name in trace_layout(fakes.make_shape()):
        assert f"`{name}`" in prose
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


def test_the_example_is_valid() -> None:
    example = json.loads((FOLDER / "example-trace.zarr.json").read_text(encoding="utf-8"))
    validator("trace.schema.json").validate(example["attributes"][NAMESPACE])


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ("format_version", 2),
        ("kind", "run"),
        ("scenario", None),
        ("layers", ["one"]),
        ("spans", {"balance": {"tokens": [1]}}),
        ("stored", {"1": {"attention": {"bytes": 5, "blake2b": "short"}}}),
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
