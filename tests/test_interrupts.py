"""Interruptions of an extraction: they wait for a moment at which nobody holds a lock."""

# What a signal does depends on what comes before and after it in the block.
# ruff: noqa: PT012

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zarrtrace.extraction import Options, extract_run
from zarrtrace.extraction.interrupts import held_back
from zarrtrace.store import verify

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers as Python sets them, whatever started the tests."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_an_interruption_waits_until_it_is_asked_for() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_back() as ask:
        ask()
        interrupt()
        reached.append("after the signal")
        ask()
        reached.append("after asking")
    assert reached == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_pending_interruption_is_raised_at_the_end() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_back():
        interrupt()
        reached.append("the end")
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_is_not_hidden_by_an_interruption() -> None:
    with pytest.raises(ZeroDivisionError), held_back():
        interrupt()
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_does_not_wait() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_back():
        interrupt()
        reached.append("first")
        interrupt()
        reached.append("second")
    assert reached == ["first"]


def test_what_is_ignored_or_ends_the_process_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with held_back() as ask:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        interrupt()
        ask()


def test_other_threads_are_left_alone() -> None:
    seen: list[Any] = []

    def other() -> None:
        with held_back() as ask:
            seen.append(signal.getsignal(signal.SIGINT))
            ask()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.torch
def test_an_extraction_stores_the_layer_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal amid a layer's computation: the layer is finished and stored, and no other."""
    from zarrtrace import capture

    real, computed = capture.capture, []

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        for record in real(*arguments, **options):
            computed.append(record.layer)
            if len(computed) == 2:
                interrupt()
            yield record

    asked = Options(layers=tuple(range(1, 7)), only=("Risky_40",), features=False)
    with monkeypatch.context() as patch:
        patch.setattr(capture, "capture", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 6 layers"):
            extract_run(tmp_path / "run", asked)
    assert computed == [1, 2]
    extract_run(tmp_path / "run", asked)
    assert verify(tmp_path / "run") == []


@pytest.mark.long
def test_writers_never_wait_for_a_lock_that_an_interruption_kept() -> None:
    """Interruptions at random moments, 300 times; without holding them back, some hang.

    Each has a minute of its own: a busy machine is slow, and only a hang stands still.
    """
    code = """
import faulthandler, os, random, signal, threading, time
from zarrtrace.extraction import writers
from zarrtrace.extraction.interrupts import held_back

class Anything:
    scenario, lacks, folder = "a", {}, None
    def append(self, record): return [("a", 1, False)]
    def stored(self, *_, **__): pass

def later():
    time.sleep(random.random() / 200)
    os.kill(os.getpid(), signal.SIGINT)

writers.OpenTraces = lambda traces: Anything()
writers.bytes_of = lambda record: 10
writers._give_way = None  # in parallel with other tests, who gives way holds Python's lock for long
signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(300):
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        with held_back() as ask, writers.WriterThreads(Anything(), Anything()) as pool:
            threading.Thread(target=later).start()
            while True:
                pool.submit(Anything())
                ask()
    except KeyboardInterrupt:
        pass
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=250
    )
    assert done.stdout == "ended\n", done.stderr
