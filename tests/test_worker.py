"""Turns of the tasks of one worker, without processes and without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zarrtrace.scenarios import Scenario
from zarrtrace.storage import locate

pytest.importorskip("distributed")

from zarrtrace.extraction import worker
from zarrtrace.extraction.orders import Item

_SECONDS = 30


@dataclass
class Step:
    """Events of a task: it has opened its traces, it computes, and it may go on."""

    opened: threading.Event = field(default_factory=threading.Event)
    computes: threading.Event = field(default_factory=threading.Event)
    may_compute: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Step]:
    """Three tasks that stop at each step, instead of those that fill traces."""
    steps = {name: Step() for name in "abc"}

    def fill(
        _folder: object,
        job: str,
        _reports: object,
        _pool: object,
        *,
        computing: AbstractContextManager[None],
        **_options: bool,
    ) -> None:
        steps[job].opened.set()
        with computing:
            steps[job].computes.set()
            assert steps[job].may_compute.wait(_SECONDS)
        assert steps[job].may_end.wait(_SECONDS)

    dask_worker = SimpleNamespace(address="here", log_event=lambda *_: None)
    fakes: dict[str, Callable[..., Any]] = {
        "get_worker": lambda: dask_worker,
        "secede": lambda: None,
        "fill": fill,
        "_check": lambda _order: None,
        "_prepared": lambda _order, scenarios, _prompts: scenarios[0].name,
        "_with_continuations": lambda job, _items: job,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(worker, name, fake)
    return steps


def test_task_computes_while_the_one_before_stores(steps: dict[str, Step], tmp_path: Path) -> None:
    order: Any = SimpleNamespace(
        run="run", folder=locate(tmp_path), repair=False, allow_nonfinite=False
    )

    def extract(name: str) -> None:
        worker.extract_some(order, [Item(Scenario("You hold $10.", name=name), 0, name)], {})
        steps[name].ended.set()

    threads = [threading.Thread(target=extract, args=(name,), daemon=True) for name in steps]
    a, b, c = steps.values()
    threads[0].start()
    assert a.computes.wait(_SECONDS)
    threads[1].start()
    assert b.opened.wait(_SECONDS)  # while `a` computes
    assert not b.computes.wait(0.05)  # the model is in use
    a.may_compute.set()
    assert b.computes.wait(_SECONDS)  # while `a` stores
    threads[2].start()
    assert not c.opened.wait(0.05)  # two tasks have writers
    a.may_end.set()
    assert a.ended.wait(_SECONDS)
    assert c.opened.wait(_SECONDS)
    assert not b.ended.is_set()
    for step in (b, c):
        step.may_compute.set()
        step.may_end.set()
    for thread in threads:
        thread.join(_SECONDS)
    assert b.ended.is_set()
    assert c.computes.is_set()
    assert c.ended.is_set()
    assert list(tmp_path.rglob("*.lock")) == []


def test_task_that_fails_lets_the_next_one_go_on(steps: dict[str, Step], tmp_path: Path) -> None:
    order: Any = SimpleNamespace(
        run="run", folder=locate(tmp_path), repair=False, allow_nonfinite=False
    )
    held = worker._held()

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such layer")

    for where in ("fill", "_prepared"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, where, fail)
            with pytest.raises(ValueError, match="no such layer"):
                worker.extract_some(order, [Item(Scenario("A.", name="a"), 0, "a")], {})
        assert held.active == []
        assert held.pools.qsize() == 2
        with held.alone():
            pass
    steps["a"].may_compute.set()
    steps["a"].may_end.set()
    worker.extract_some(order, [Item(Scenario("A.", name="a"), 0, "a")], {})
    assert steps["a"].computes.is_set()
