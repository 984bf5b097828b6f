"""Counting the chunks that are read, by the ranges of files that the process reads."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import index_of


class ChunkReads:
    """Reads of files since the last :meth:`clear`, in any thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ranges: list[tuple[Path, int, int]] = []
        paths: dict[int, Path] = {}
        opening, reading = os.open, os.pread

        def watched_open(file: Any, *arguments: Any, **options: Any) -> int:
            handle = opening(file, *arguments, **options)
            paths[handle] = Path(os.fspath(file))
            return handle

        def watched_pread(handle: int, length: int, start: int) -> bytes:
            self._ranges.append((paths[handle], start, length))
            return reading(handle, length, start)

        monkeypatch.setattr(os, "open", watched_open)
        monkeypatch.setattr(os, "pread", watched_pread)

    def clear(self) -> None:
        """Forget what was read."""
        self._ranges.clear()

    def below(self, folder: Path) -> Counter[str]:
        """Count how often each chunk below a folder was read.

        Returns
        -------
        Counter
            By names such as ``Safe_1/features/1.0.0`` (the second chunk along the first dimension);
            those of which any byte was read.
        """
        found: Counter[str] = Counter()
        for file, start, length in self._ranges:
            if folder in file.parents and file.name.startswith("c."):
                array = file.parent.relative_to(folder)
                found.update(f"{array}/{chunk}" for chunk in _chunks(file, start, start + length))
        return found

    def arrays(self, folder: Path) -> set[str]:
        """Return the names of arrays of which chunks were read."""
        return {chunk.split("/")[-2] for chunk in self.below(folder)}


def _chunks(file: Path, start: int, stop: int) -> list[str]:
    """Name the chunks that a range of a file overlaps."""
    place = np.array([int(number) for number in file.name.split(".")[1:]])
    node = json.loads((file.parent / "zarr.json").read_text())
    if node["codecs"][0]["name"] != "sharding_indexed":
        return [".".join(map(str, place))]
    index = index_of(file)
    grid = index.shape[:-1]
    return [
        ".".join(map(str, place * grid + np.unravel_index(number, grid)))
        for number, (offset, length) in enumerate(index.reshape(-1, 2).tolist())
        if offset < stop and start < offset + length
    ]
