"""Runs of thousands of traces in seconds: one is written, the others share its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fakes

from zarrtrace.format.attributes import RunAttributes
from zarrtrace.store.metadata import read_trace
from zarrtrace.store.seal import sealed_group


def names_of(count: int) -> list[str]:
    """Return the names of the scenarios."""
    return [f"S{number:06}" for number in range(count)]


def make_many(folder: Path, count: int) -> Path:
    """Write a run of equal traces of one layer: hard links to the files of the first.

    Each has attributes and a seal of its own, as if it had been extracted.
    """
    names = names_of(count)
    run = fakes.make_run(folder, scenarios=names[:1], layers=(1,), heads=1, features=8).path
    first = read_trace(run / names[0])
    files = [file.relative_to(first.path.path or run) for file in (run / names[0]).glob("*/*")]
    for number, name in enumerate(names[1:], 1):
        trace = run / name
        trace.mkdir()
        for array in first.nodes:
            (trace / array).mkdir()
        for file in files:
            (trace / file).hardlink_to(run / names[0] / file)
        tags = ("risky",) if number % 2 else ("safe",)
        attributes = first.attributes.model_copy(update={"scenario": name, "tags": tags})
        (trace / "zarr.json").write_bytes(sealed_group(attributes, first.nodes))
    write_run(run, names)
    return run


def write_run(run: Path, names: Sequence[str]) -> None:
    """Write the metadata of a run that is complete, without that of its traces."""
    attributes = RunAttributes(scenarios=tuple(names), config=fakes.CONFIG, complete=True)
    (run / "zarr.json").write_bytes(sealed_group(attributes, None))
