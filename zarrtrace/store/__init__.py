"""Runs and traces on disk: the only package that touches Zarr."""

from zarrtrace.store.attributes import kind_of, read_run_attributes, read_trace_attributes
from zarrtrace.store.reader import array_of, check_sizes, open_run, open_trace
from zarrtrace.store.summary import RunSummary, TraceSummary, summarize
from zarrtrace.store.verify import Problem, verify
from zarrtrace.store.writer import TOKENS, RunWriter, TraceWriter

__all__ = [
    "TOKENS",
    "Problem",
    "RunSummary",
    "RunWriter",
    "TraceSummary",
    "TraceWriter",
    "array_of",
    "check_sizes",
    "kind_of",
    "open_run",
    "open_trace",
    "read_run_attributes",
    "read_trace_attributes",
    "summarize",
    "verify",
]
