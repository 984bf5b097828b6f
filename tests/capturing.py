"""Captures taken apart into the records of each prompt."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

from zarrtrace.capture import capture
from zarrtrace.records import LayerBatch, LayerRecord, TokensRecord


def records_of(*given: Any, **options: Any) -> Generator[LayerRecord | TokensRecord]:
    """Capture, and yield records; what is asked for is :func:`capture`'s."""
    with closing(capture(*given, **options)) as captured:
        for one in captured:
            if isinstance(one, LayerBatch):
                yield from one.records()
            else:
                yield one
