"""Captures taken apart into the records of each prompt, and runs of small limits."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from zarrtrace.capture import CaptureLimits, capture
from zarrtrace.extraction import Options, running
from zarrtrace.extraction.job import prepare
from zarrtrace.extraction.processes import WriterPool
from zarrtrace.extraction.progress import Progress
from zarrtrace.extraction.running import fill
from zarrtrace.layer_batches import LayerBatch
from zarrtrace.records import LayerRecord, TokensRecord
from zarrtrace.storage import locate
from zarrtrace.store import RunWriter


def records_of(*given: Any, **options: Any) -> Generator[LayerRecord | TokensRecord]:
    """Capture, and yield records; what is asked for is :func:`capture`'s."""
    with closing(capture(*given, **options)) as captured:
        for one in captured:
            if isinstance(one, LayerBatch):
                yield from one.records()
            else:
                yield one


def extract_within(limits: CaptureLimits, output: Path, options: Options) -> Path:
    """Extract a run in parts that are smaller than :func:`zarrtrace.extract` makes them."""
    with WriterPool() as pool:
        job = prepare(options, progress=False, pool=pool, limits=limits)
        layers = {prompt.scenario.name: len(job.layers) for prompt in job.prompts}
        with RunWriter(output, list(layers), job.config) as run, Progress(layers, None) as bars:
            fill(locate(output), job, bars, pool)
            run.finish()
    return output


@contextmanager
def interrupted_after(records: int, writers: Any = running.WriterThreads) -> Iterator[None]:
    """Interrupt an extraction as it hands over one of its records to be written."""
    real = writers.submit
    submitted = []

    def stop_later(self: Any, record: Any) -> None:
        submitted.append(record)
        if len(submitted) == records:
            raise KeyboardInterrupt
        real(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "submit", stop_later)
        with pytest.raises(KeyboardInterrupt):
            yield
