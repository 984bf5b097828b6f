"""How far a run is: on stderr, from this process or from many."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import tqdm

_SECONDS_A_LINE = 30

#: Two bars, or a line now and then, for logs; None for nothing.
Shown = Literal["bars", "lines"] | None


def say(notes: Sequence[str], shown: Shown) -> None:
    """Write notes on stderr, if anything is shown there."""
    for note in notes if shown else ():
        sys.stderr.write(f"zarrtrace: {note}\n")


def _bar() -> type[tqdm.tqdm[Any]]:
    """Return the kind of bar that is drawn here: a widget in a notebook that has them."""
    if "ipykernel.zmqshell" not in sys.modules:
        return tqdm.tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tqdm.TqdmWarning)  # that there are no widgets
        from tqdm.auto import tqdm as auto  # noqa: PLC0415 -- asyncio, for notebooks alone
    kind: type[tqdm.tqdm[Any]] = auto
    return kind


class ProgressListener(Protocol):
    """Receiver of an extraction's progress, from any thread; may end it."""

    def found(self, scenario: str, missing: int, *, complete: bool) -> None:
        """Take note of how many layers a scenario lacks before anything is computed."""
        ...

    def stored(self, scenario: str, missing: int, *, complete: bool) -> None:
        """Take note of how many layers a scenario still lacks."""
        ...

    def check(self) -> None:
        """Raise if the extraction should end; called between two records."""
        ...


class _CountProgress:
    """Things of one kind on stderr: a bar, or a line now and then.

    A context manager; an interruption that leaves it says how many there were.
    """

    def __init__(self, total: int, done: int, shown: Shown, unit: str) -> None:
        self._total, self._done, self._unit = total, done, unit
        self._lines, self._said = shown == "lines" and total > 0, time.monotonic()
        self._bar = _bar()(
            total=total,
            initial=done,
            desc=f"{unit}s",
            unit=unit,
            disable=shown != "bars" or not total,
            file=sys.stderr,
        )

    def __enter__(self) -> Self:
        return self

    def update(self, done: int) -> None:
        """Count what was computed."""
        self._done += done
        self._bar.update(done)
        if self._lines and time.monotonic() - self._said > _SECONDS_A_LINE:
            self._said = time.monotonic()
            sys.stderr.write(f"zarrtrace: {self}\n")

    def __str__(self) -> str:
        """Say how many there are."""
        return f"{self._done:,} of {self._total:,} {self._unit}s"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped after {self}") from None


class GenerationProgress(_CountProgress):
    """Continuations, and the time they take.

    Parameters
    ----------
    total
        Number of tokens asked for; 0 shows nothing.
    shown
        In which form.
    """

    def __init__(self, total: int, shown: Shown) -> None:
        super().__init__(total, 0, shown, "continuation")
        self._started, self.seconds = time.monotonic(), 0.0

    def found(self, done: int) -> None:
        """Count out continuations that an earlier process generated."""
        self._done += done
        if not self._bar.disable:
            self._bar.initial += done  # no part of the rate
        self._bar.update(done)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add what happens to the time that continuations take."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started

    @property
    def share(self) -> str:
        """How much of the time since the beginning continuations took; empty if there are none."""
        if not self._total:
            return ""
        share = self.seconds / max(time.monotonic() - self._started, 1e-9)
        return f"{share:.0%} of the time in generate".replace("%", " %")


class Progress:
    """Layers of all scenarios, and scenarios, on stderr: two bars, or a line now and then.

    A context manager; an interruption that leaves it says how far the run was.

    Parameters
    ----------
    layers
        By scenario, how many layers it has.
    shown
        In which form.
    generation
        The continuations that were generated before.
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        shown: Shown,
        generation: GenerationProgress | None = None,
    ) -> None:
        self._mutex, self._generation, self._shown = threading.Lock(), generation, shown
        self._lines, self._said = shown == "lines", time.monotonic()
        self._missing = dict(layers)
        self._found: set[str] = set()
        self._complete: set[str] = set()
        self._stored, self._layers = 0, sum(layers.values())
        hidden, bar = shown != "bars", _bar()
        self._layer_bar = bar(
            total=self._layers, desc="layers", unit="layer", disable=hidden, file=sys.stderr
        )
        self._scenario_bar = bar(
            total=len(layers), desc="scenarios", unit="scenario", disable=hidden, file=sys.stderr
        )

    def __enter__(self) -> Self:
        return self

    def found(self, scenario: str, missing: int, *, complete: bool) -> None:
        """Count out what an earlier process has stored.

        A scenario that is found again was begun by a worker that died: what it stored counts.
        """
        with self._mutex:
            if scenario in self._found:
                self._count(scenario, missing, complete=complete)
                return
            self._found.add(scenario)
            self._layers -= self._missing[scenario] - missing
            self._missing[scenario] = missing
            if self._layer_bar.n:
                self._layer_bar.total = self._layers
            else:  # a widget has a total of its own
                self._layer_bar.reset(self._layers)
            if complete:
                self._complete.add(scenario)
                if not self._scenario_bar.disable:
                    self._scenario_bar.initial += 1  # no part of the rate
                self._scenario_bar.update()
            self._layer_bar.refresh()

    def stored(self, scenario: str, missing: int, *, complete: bool) -> None:
        """Count what a record has completed."""
        with self._mutex:
            self._count(scenario, missing, complete=complete)

    def _count(self, scenario: str, missing: int, *, complete: bool) -> None:
        new = max(0, self._missing[scenario] - missing)
        self._missing[scenario] -= new
        self._stored += new
        self._layer_bar.update(new)
        if complete and scenario not in self._complete:
            self._complete.add(scenario)
            self._scenario_bar.update()
        if self._lines and time.monotonic() - self._said > _SECONDS_A_LINE:
            self._said = time.monotonic()
            sys.stderr.write(f"zarrtrace: {self}\n")

    def check(self) -> None:
        """Nothing: who watches a bar stops a run with a signal."""

    def __str__(self) -> str:
        """Say how far the run is; layers are those that this command was to store."""
        return (
            f"{self._stored} of {self._layers} layers, {len(self._complete)} of "
            f"{len(self._missing)} scenarios{_and_share(self._generation)}"
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._scenario_bar.close()
        self._layer_bar.close()
        if kind is None and self._shown and self._generation and self._generation.share:
            sys.stderr.write(f"zarrtrace: {self}\n")
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped after {self}") from None


def _and_share(generation: GenerationProgress | None) -> str:
    return f"; {generation.share}" if generation is not None and generation.share else ""


class SampleProgress(_CountProgress):
    """Samples of a table.

    Parameters
    ----------
    samples, done
        Numbers of samples in the table, and of those stored before.
    shown
        In which form.
    generation
        The continuations that were generated before.
    """

    def __init__(
        self,
        samples: int,
        done: int,
        shown: Shown,
        generation: GenerationProgress | None = None,
    ) -> None:
        super().__init__(samples, done, shown, "sample")
        self._generation, self._shown = generation, shown

    def __str__(self) -> str:
        """Say how far the table is."""
        return f"{super().__str__()}{_and_share(self._generation)}"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        super().__exit__(kind)
        if kind is None and self._shown and self._generation and self._generation.share:
            sys.stderr.write(f"zarrtrace: {self}\n")
