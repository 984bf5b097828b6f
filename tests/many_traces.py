"""Runs of thousands of traces in seconds: one is written, the others share its files."""

from __future__ import annotations

import os
from pathlib import Path

import fakes

from zarrtrace.format.attributes import RunAttributes
from zarrtrace.store.metadata import read_trace, sealed_group


def make_many(folder: Path, count: int) -> Path:
    """Write a run of `count` equal traces of one layer: hard links to the files of the first.

    Each has attributes and a seal of its own, as if it had been extracted.
    """
    names = [f"S{number:06}" for number in range(count)]
    run = fakes.make_run(folder, scenarios=names[:1], layers=(1,), heads=1, features=8).path
    first = read_trace(run / names[0])
    files = [f"{name}/{file}" for name in first.nodes for file in os.listdir(run / names[0] / name)]
    for name in names[1:]:
        trace = run / name
        trace.mkdir()
        for array in first.nodes:
            (trace / array).mkdir()
        for file in files:
            (trace / file).hardlink_to(run / names[0] / file)
        tags = ("risky",) if name[-1] in "02468" else ("safe",)
        attributes = first.attributes.model_copy(update={"scenario": name, "tags": tags})
        (trace / "zarr.json").write_bytes(sealed_group(attributes, first.nodes))
    attributes = RunAttributes(scenarios=tuple(names), config=fakes.CONFIG, complete=True)
    (run / "zarr.json").write_bytes(sealed_group(attributes, None))
    return run
