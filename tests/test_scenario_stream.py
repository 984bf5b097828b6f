"""Streams of scenarios: final at once, read again and again, and never all in memory."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios import Scenario, as_scenarios, load_suite, stream
from zarrtrace.scenarios import streams as streams_module
from zarrtrace.scenarios.tables import BATCH


def _rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"prompt {n} " + "x" * 200,
            "name": f"game_{n}",
            "round": n if n % 3 else None,
            "game": f"g{n // 40}",
            "won": n % 2 == 0,
        }
        for n in range(count)
    ]


def _jsonl(rows: list[dict[str, Any]], file: Path) -> None:
    with file.open("w") as out:
        for row in rows:
            fields = {name: row[name] for name in ("prompt", "name")}
            metadata = {name: value for name, value in row.items() if name not in fields}
            out.write(json.dumps({**fields, "metadata": metadata}) + "\n")


def _csv(rows: list[dict[str, Any]], file: Path) -> None:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _parquet(rows: list[dict[str, Any]], file: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), file, compression="none", use_dictionary=False)


def _saved(rows: list[dict[str, Any]], folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(folder)


_FILES = {"a.jsonl": _jsonl, "a.csv": _csv, "a.parquet": _parquet, "saved": _saved}


@pytest.fixture(params=list(_FILES))
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A source of a thousand scenarios."""
    path: Path = tmp_path / request.param
    _FILES[request.param](_rows(1000), path)
    return path


# --- the same scenarios, one by one --------------------------------------------------------------


@pytest.mark.long
def test_a_stream_knows_its_columns_and_is_read_again_and_again(file: Path) -> None:
    suite = stream(file)
    assert len(suite) == 1000
    assert suite.metadata == {"round": float, "game": str, "won": bool}
    first, again = list(suite), list(suite)
    assert [s.name for s in first] == [s.name for s in again] == [f"game_{n}" for n in range(1000)]
    frame = pd.DataFrame([s.metadata for s in first])
    expected = pd.DataFrame(_rows(1000))[["round", "game", "won"]]
    pd.testing.assert_frame_equal(frame, expected, check_like=True)
    # Two passes at once do not disturb each other.
    pairs = list(itertools.islice(zip(suite, suite, strict=True), 300))
    assert all(one.prompt == other.prompt for one, other in pairs)
    assert stream(suite) is suite
    assert [s.prompt for s in as_scenarios(suite)] == [s.prompt for s in load_suite(file)]


@pytest.mark.long
def test_only_some_names(file: Path) -> None:
    suite = stream(file).only(["game_700", "game_3", "game_3"])
    assert len(suite) == 2
    assert [s.name for s in suite] == ["game_3", "game_700"]
    # Types are those of the whole: rounds are floats for those that are missing elsewhere.
    assert [s.metadata["round"] for s in suite if s.name == "game_700"] == [700.0]
    assert [type(s.metadata["round"]) for s in suite] == [float, float]
    assert len(stream(file).only([])) == 1000
    with pytest.raises(ScenarioError, match=r"(?s)no scenario 'game_l'.*The suite has") as caught:
        stream(file).only(["game_1", "game_l"])
    assert "Did you mean 'game_" in str(caught.value)


def test_a_generator_is_taken_once_and_read_again() -> None:
    suite = stream(iter(["x", "y"]))
    assert [s.prompt for s in suite] == [s.prompt for s in suite] == ["x", "y"]


# --- laziness ----------------------------------------------------------------------------------


def test_nothing_is_read_before_it_is_asked_for(file: Path) -> None:
    spoilt = file if file.is_file() else next(file.glob("*.arrow"))
    spoilt.write_bytes(b"neither of them\n" * 3)
    suite = stream(file)
    with pytest.raises(ScenarioError, match=r"a\.|\.arrow"):
        len(suite)


def test_a_sequence_is_read_no_further_than_asked() -> None:
    class Counted:
        asked = 0

        def __iter__(self) -> Iterator[str]:
            for number in range(1000):
                self.asked += 1
                yield f"prompt {number}"

    counted = Counted()
    suite = stream(counted)
    assert counted.asked == 0
    assert len(suite) == 1000
    counted.asked = 0
    assert [s.name for s in itertools.islice(suite, 3)] == [f"scenario_{n}" for n in range(3)]
    assert counted.asked == 3


def test_a_frame_is_read_a_batch_at_a_time() -> None:
    asked = []

    class Watched(pd.DataFrame):
        @property
        def iloc(self) -> Any:
            asked.append(1)
            return super().iloc

    suite = stream(Watched(_rows(1000)))
    assert len(suite) == 1000
    asked.clear()
    assert len(list(itertools.islice(suite, BATCH + 1))) == BATCH + 1
    assert len(asked) == 2


@pytest.mark.long
@pytest.mark.parametrize("kind", list(_FILES))
def test_memory_does_not_grow_with_the_scenarios(kind: str, tmp_path: Path) -> None:
    """Python's and NumPy's memory; that of Arrow is in scripts/bench/scenarios.py."""

    def peak(count: int) -> int:
        path = tmp_path / f"{count}_{kind}"
        _FILES[kind](_rows(count), path)
        if count == few:
            list(stream(path))  # modules, caches
        tracemalloc.start()
        try:
            assert sum(1 for _ in stream(path)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = 2 * BATCH, 6 * BATCH
    # 16 bytes a scenario are kept, some more while they are sorted; a prompt has 200.
    assert peak(many) < peak(few) + 60 * (many - few) + 40_000


# --- changes -----------------------------------------------------------------------------------


def test_a_file_that_has_changed_is_refused(file: Path) -> None:
    suite = stream(file)
    assert len(suite) == 1000
    touched = file if file.is_file() else next(file.glob("*.arrow"))
    with touched.open("ab") as out:
        out.write(b"\n")
    with pytest.raises(ScenarioError, match=rf"{file}.*changed since they were first read"):
        next(iter(suite))


@pytest.mark.parametrize("kind", ["a.jsonl", "a.csv", "a.parquet"])
def test_other_prompts_are_noticed_whatever_the_clock_says(kind: str, tmp_path: Path) -> None:
    file = tmp_path / kind
    rows = _rows(600)
    _FILES[kind](rows, file)
    suite = stream(file)
    assert len(suite) == 600
    before = file.stat()
    rows[400]["prompt"] = rows[400]["prompt"].replace("x", "y")
    _FILES[kind](rows, file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    passed: list[str] = []
    with pytest.raises(ScenarioError, match="changed since they were first read"):
        passed.extend(scenario.prompt for scenario in suite)
    assert passed == [row["prompt"] for row in rows[:400]]


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given.pop(),
        lambda given: given.append("another"),
        lambda given: given[1].update(prompt="other"),
        lambda given: given[1]["metadata"].update(n=5),
        lambda given: given[1]["metadata"].update(n=2.0),
        lambda given: given[1].update(tags=["t"]),
        lambda given: given[1].update(name="b"),
    ],
)
def test_a_list_that_has_changed_is_refused(change: Callable[[list[Any]], Any]) -> None:
    given = ["x", {"prompt": "y", "metadata": {"n": 2}}, "z"]
    suite = stream(given)
    assert len(suite) == 3
    change(given)
    with pytest.raises(ScenarioError, match="changed since they were first read"):
        list(suite)


def test_a_scenario_that_is_not_taken_changes_nothing() -> None:
    given = [{"prompt": "x", "metadata": {"n": math.nan}}, Scenario("y", metadata={"n": None})]
    suite = stream(given)
    assert len(suite) == len(list(suite)) == len(list(suite)) == 2  # NaN differs from itself


# --- names -------------------------------------------------------------------------------------


def test_a_name_far_away_is_a_rival(tmp_path: Path) -> None:
    rows = _rows(900)
    rows[850]["name"] = "GAME_7"
    _csv(rows, tmp_path / "a.csv")
    suite = stream(tmp_path / "a.csv")
    with pytest.raises(ScenarioError, match="'GAME_7' is taken by 'game_7'") as caught:
        next(iter(suite))
    assert str(caught.value).startswith(f"{tmp_path / 'a.csv'}:852: ")


def test_names_with_one_hash_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes only raise suspicion: with one value for all names, different names still pass."""
    monkeypatch.setattr(streams_module, "hash", lambda _: 7, raising=False)
    suite = stream([Scenario("x", name="a"), Scenario("y", name="b"), "z"])
    assert [s.name for s in suite] == ["a", "b", "scenario_2"]
    with pytest.raises(ScenarioError, match="'A' is taken by 'a'"):
        list(stream([Scenario("x", name="a"), Scenario("y", name="b"), Scenario("z", name="A")]))


# --- folders -----------------------------------------------------------------------------------


def _part(file: Path, *prompts: str, **columns: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": list(prompts), **columns}), file)


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1, 2):
        _part(tmp_path / "own.parquet" / f"part.{number}.parquet", f"p{number}")
    (tmp_path / "own.parquet" / "README.md").write_text("hello")
    suite = load_suite(tmp_path / "own.parquet")
    assert [s.prompt for s in suite] == ["p1", "p2", "p9", "p10"]
    assert [s.name for s in suite] == [f"scenario_{n}" for n in range(4)]


def test_columns_are_typed_over_all_parts(tmp_path: Path) -> None:
    _part(tmp_path / "d" / "0.parquet", "x", n=[1])
    _part(tmp_path / "d" / "1.parquet", "y", n=[0.5])
    assert [s.metadata["n"] for s in load_suite(tmp_path / "d")] == [1.0, 0.5]
    _part(tmp_path / "d" / "1.parquet", "y", m=[0.5])
    with pytest.raises(ScenarioError, match=r"1\.parquet: has other columns than 0\.parquet: m, n"):
        load_suite(tmp_path / "d")
    _part(tmp_path / "d" / "1.parquet", "", n=[2])
    with pytest.raises(ScenarioError, match=r"1\.parquet: row 0: prompt: String should have"):
        load_suite(tmp_path / "d")


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _part(tmp_path / "data" / f"{split}-00000-of-00001.parquet", split)
    with pytest.raises(ScenarioError, match=r"several data sets: data/test, data/train"):
        stream(tmp_path)
    for split in ("train", "test"):
        _part(tmp_path / "hub" / "default" / split / "0000.parquet", split)
    with pytest.raises(ScenarioError, match=r"several data sets: default/test, default/train"):
        stream(tmp_path / "hub")
    assert [s.prompt for s in load_suite(tmp_path / "hub" / "default" / "test")] == ["test"]


def test_saved_splits_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict({"prompt": ["x", "y"], "label": [0, 1]})
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "both")
    with pytest.raises(ScenarioError, match="several data sets: test, train") as caught:
        stream(tmp_path / "both")
    assert f"as {tmp_path / 'both' / 'test'}" in caught.value.remedy
    assert load_suite(tmp_path / "both" / "test") == as_scenarios(whole)
    # Rows that were chosen and put in another order are saved so.
    whole.select([1]).save_to_disk(tmp_path / "one")
    assert [s.prompt for s in as_scenarios(str(tmp_path / "one"))] == ["y"]
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    with pytest.raises(ScenarioError, match=r"state\.json: not one of Dataset\.save_to_disk"):
        stream(tmp_path / "one")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    with pytest.raises(ScenarioError, match="not a usable Parquet file") as caught:
        load_suite(tmp_path)
    assert "git lfs pull" in caught.value.remedy


def test_a_word_that_is_a_folder_is_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    assert [s.prompt for s in stream("notes")] == ["notes"]
    _part(tmp_path / "notes" / "a.parquet", "inside")
    assert [s.prompt for s in stream("notes")] == ["inside"]
    assert [s.prompt for s in stream(["notes"])] == ["notes"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScenarioError, match="holds no data set"):
        stream(Path("empty"))
