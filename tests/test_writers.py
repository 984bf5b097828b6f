"""Traces that several threads or processes write: opening, storing, publishing."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fakes
import pytest

from zarrtrace.errors import StoreError
from zarrtrace.extraction import writers
from zarrtrace.extraction.processes import WriterPool, WriterProcesses
from zarrtrace.extraction.writers import MissingParts, OpenTraces, Stored, Traces
from zarrtrace.records import LayerRecord, TracePlan
from zarrtrace.storage import locate
from zarrtrace.store import TraceWriter, is_untouched, open_trace, staging_folder

NAMES = fakes.SCENARIOS[:2]
SECONDS = 30


def traces(run: Path, plans: Sequence[TracePlan]) -> Traces:
    run.mkdir(exist_ok=True)
    return Traces(locate(run), plans, repair=False, allow_nonfinite=False)


def write(opened: OpenTraces, scenario: str) -> list[Stored]:
    """Append all records of a trace; returns what was said of them."""
    return [said for record in fakes.make_records(scenario) for said in opened.append(record)]


def test_others_are_written_while_a_trace_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, may_go_on, real, synced = threading.Event(), threading.Event(), writers.disk.sync, []

    def sync(folder: Path) -> None:
        waits.set()
        assert may_go_on.wait(SECONDS)
        synced.append(folder)
        real(folder)

    monkeypatch.setattr(writers.disk, "sync", sync)
    opened = OpenTraces(traces(tmp_path / "run", [fakes.make_plan(name) for name in NAMES]))
    assert not any(said.complete for said in write(opened, NAMES[0]))
    assert waits.wait(SECONDS)
    said = write(opened, NAMES[1])
    assert said[-1] == Stored(NAMES[1], 0, complete=False)
    assert not (tmp_path / "run" / NAMES[0]).exists()
    may_go_on.set()
    assert opened.close() == [Stored(name, 0, complete=True) for name in NAMES]
    assert len(synced) == 2
    for name in NAMES:
        assert open_trace(tmp_path / "run" / name).sizes["layer"] == len(fakes.LAYERS)


def test_what_is_complete_together_is_synced_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, real, synced = threading.Event(), writers.disk.sync, []

    def sync(folder: Path) -> None:
        assert may_go_on.wait(SECONDS)
        synced.append(folder)
        real(folder)

    monkeypatch.setattr(writers.disk, "sync", sync)
    names = fakes.SCENARIOS[:3]
    opened = OpenTraces(traces(tmp_path / "run", [fakes.make_plan(name) for name in names]))
    for name in names:
        write(opened, name)
    may_go_on.set()
    assert {said.scenario for said in opened.close()} == set(names)
    assert len(synced) <= 2


def test_the_error_of_the_earliest_record_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a later record fails first, in another thread."""
    has_failed = threading.Event()

    def append(_self: OpenTraces, record: LayerRecord) -> list[Stored]:
        if record.scenario == NAMES[0]:
            assert has_failed.wait(SECONDS)
            time.sleep(0.1)  # so that the other error is noted first
        else:
            has_failed.set()
        raise ValueError(record.scenario)

    monkeypatch.setattr(OpenTraces, "append", append)
    asked = traces(tmp_path / "run", [fakes.make_plan(name) for name in NAMES])
    records = [next(iter(fakes.make_records(name))) for name in NAMES]

    def submit_all() -> None:
        with writers.WriterThreads(asked, _Nobody()) as opened:
            opened.submit(records[0])
            while True:
                opened.submit(records[1])

    with pytest.raises(ValueError, match=f"^{NAMES[0]}$"):
        submit_all()


def test_beside_a_gpu_every_thread_has_a_record_of_a_long_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of 32 MiB, all of which are in hand before the first is done."""
    cores = 3
    together = threading.Barrier(cores)

    def append(_self: OpenTraces, _record: LayerRecord) -> list[Stored]:
        together.wait(SECONDS)
        return []

    monkeypatch.setattr(OpenTraces, "append", append)
    monkeypatch.setattr(writers, "cpus", lambda: cores)
    monkeypatch.setattr(writers, "bytes_of", lambda _record: 32 * 2**20)
    asked = traces(tmp_path / "run", [fakes.make_plan(NAMES[0])])
    with writers.WriterThreads(asked, _Nobody(), gpu=True) as opened:
        for _ in range(cores):
            opened.submit(next(iter(fakes.make_records(NAMES[0]))))


def test_a_trace_that_cannot_be_published_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = OpenTraces(traces(tmp_path / "run", [fakes.make_plan(name) for name in NAMES]))
    (tmp_path / "run" / NAMES[0]).write_text("somebody else's")

    def write_both() -> None:
        write(opened, NAMES[0])  # raises, if the disk is fast
        opened._publishing.submit(int).result()  # behind the publishing
        write(opened, NAMES[1])

    with pytest.raises(StoreError, match="a file is where a folder should be"):
        write_both()
    with pytest.raises(StoreError, match="a file is where a folder should be"):
        opened.close()
    monkeypatch.undo()
    (tmp_path / "run" / NAMES[0]).unlink()
    again = OpenTraces(traces(tmp_path / "run", [fakes.make_plan(name) for name in NAMES]))
    assert again.close() == []
    assert open_trace(tmp_path / "run" / NAMES[0]).sizes["layer"] == len(fakes.LAYERS)
    assert again.lacks[NAMES[0]] == MissingParts((), tokens=False)


@pytest.mark.parametrize("options", [{}, {"next_token": False}, {"heads": None}, {"features": 0}])
def test_traces_that_begin_lack_what_their_writers_say(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """They are not asked where there is nothing to be found."""
    plans = [fakes.make_plan(name, **options) for name in NAMES]
    given = traces(tmp_path / "run", plans)
    with WriterPool(1) as pool, WriterProcesses(given, _Nobody(), pool) as found:
        assert found._begins
    for plan in plans:
        writer = TraceWriter(tmp_path / "other", plan)
        expected = MissingParts(writer.missing_layers, writer.needs_tokens)
        assert found.lacks[plan.attributes.name] == expected


def test_only_traces_that_are_written_are_open(tmp_path: Path) -> None:
    opened = OpenTraces(traces(tmp_path / "run", [fakes.make_plan(name) for name in NAMES]))
    assert opened._writers == {}
    said = write(opened, NAMES[0]) + opened.close()
    assert said[-1] == Stored(NAMES[0], 0, complete=True)
    assert opened._writers == {}


class _Nobody:
    """Is told of what happens, and does nothing."""

    def found(self, scenario: str, missing: int, *, complete: bool) -> None: ...

    def stored(self, scenario: str, missing: int, *, complete: bool) -> None: ...

    def check(self) -> None: ...


def test_traces_that_have_begun_are_asked_for(tmp_path: Path) -> None:
    run = locate(tmp_path / "run")
    plans = [fakes.make_plan(name) for name in NAMES]
    given = traces(tmp_path / "run", plans)
    assert is_untouched(run, NAMES)
    writer = TraceWriter(run, plans[0])
    records = list(fakes.make_records(NAMES[0]))
    writer.append(records[0])
    assert not is_untouched(run, NAMES)
    assert is_untouched(run, NAMES[1:])
    with WriterPool(1) as pool, WriterProcesses(given, _Nobody(), pool) as found:
        assert not found._begins
        assert found.lacks[NAMES[0]].layers == tuple(fakes.LAYERS)[1:]
        assert found.lacks[NAMES[1]].layers == tuple(fakes.LAYERS)
    for record in records[1:]:
        writer.append(record)
    writer.finish()
    assert not is_untouched(run, NAMES)
    staged = staging_folder(run)
    staged.mkdir(exist_ok=True)
    (tmp_path / "run" / NAMES[0]).rename(staged / f"{NAMES[0]}.old")
    assert not is_untouched(run, NAMES)


def test_an_object_store_is_not_asked() -> None:
    assert not is_untouched(locate("memory://bucket/run"), NAMES)
