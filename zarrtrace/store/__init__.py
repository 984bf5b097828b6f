"""Runs and traces on disk: the only package that touches Zarr."""

from zarrtrace.store.attributes import kind_of, read_run_attributes, read_trace_attributes
from zarrtrace.store.reader import open_run, open_trace, span
from zarrtrace.store.writer import TOKENS, RunWriter, TraceWriter

__all__ = [
    "TOKENS",
    "RunWriter",
    "TraceWriter",
    "kind_of",
    "open_run",
    "open_trace",
    "read_run_attributes",
    "read_trace_attributes",
    "span",
]
