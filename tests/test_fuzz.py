"""Readers of strangers' files raise our own errors only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fuzzing
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ways = st.lists(st.integers(0, 20), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzzing.Targets]:
    return fuzzing.Targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.long
@given(fuzzing.yaml_text)
def test_yaml(targets: fuzzing.Targets, text: str) -> None:
    targets.suite(text.encode("utf-8", "surrogatepass"), ".yaml")


@given(st.lists(fuzzing.entries, min_size=1, max_size=3))
def test_entries(targets: fuzzing.Targets, entries: list[Any]) -> None:
    targets.suite("\n".join(map(json.dumps, entries)).encode(), ".jsonl")
    targets.suite(json.dumps({"scenarios": entries}).encode(), ".yaml")
    targets.scenarios(entries)
    frame = pd.DataFrame([{"prompt": "x", **entry} for entry in entries], dtype=object)
    targets.scenarios(frame)


@given(st.one_of(fuzzing.anything, st.text()))
def test_whatever_is_given_as_scenarios(targets: fuzzing.Targets, given: Any) -> None:
    targets.scenarios(given)


@given(fuzzing.csv_text)
def test_csv(targets: fuzzing.Targets, text: str) -> None:
    targets.suite(text.encode("utf-8", "surrogatepass"), ".csv")


@given(st.binary(max_size=200))
def test_parquet(targets: fuzzing.Targets, content: bytes) -> None:
    targets.suite(b"PAR1" + content + b"PAR1", ".parquet")


@pytest.mark.long
@settings(max_examples=40)
@given(st.sampled_from(fuzzing.FILES), ways, fuzzing.anything)
def test_metadata_and_attributes(
    targets: fuzzing.Targets, name: str, way: list[int], value: Any
) -> None:
    targets.store(name, lambda found: fuzzing.changed(found, way, value))


@pytest.mark.long
@settings(max_examples=40)
@given(st.integers(0, 4), ways, fuzzing.anything)
def test_journals(targets: fuzzing.Targets, number: int, way: list[int], value: Any) -> None:
    targets.journal(number, lambda found: fuzzing.changed(found, way, value))


offsets = st.one_of(st.integers(0, 2000), st.sampled_from([2**31, 2**63, 2**64 - 1]))


@pytest.mark.long
@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), offsets, offsets), min_size=1, max_size=4))
def test_indexes_of_files(targets: fuzzing.Targets, entries: list[tuple[int, int, int]]) -> None:
    targets.index(entries)


@settings(max_examples=50)
@given(st.binary(max_size=200), st.booleans())
def test_npz(targets: fuzzing.Targets, content: bytes, whole: bool) -> None:
    targets.layer(content if whole else b"\x93NUMPY\x01\x00" + content, whole=whole)


@settings(max_examples=50)
@given(ways, fuzzing.anything)
def test_npz_metadata(targets: fuzzing.Targets, way: list[int], value: Any) -> None:
    targets.metadata(lambda found: fuzzing.changed(found, way, value))
