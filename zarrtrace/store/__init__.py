"""Runs and traces on disk: the only package that touches Zarr."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarrtrace.store.attributes import (
        TOKENS,
        kind_of,
        read_run_attributes,
        read_trace_attributes,
        refuse_foreign,
    )
    from zarrtrace.store.copying import copy_run
    from zarrtrace.store.files import (
        beside,
        clear_errors,
        no_space,
        remove_tree,
        replace_folder,
        write_whole,
    )
    from zarrtrace.store.indexable import (
        IndexableTrace,
        indexable_traces,
        read_features,
        read_token_texts,
    )
    from zarrtrace.store.locks import (
        only_writer,
        remove_trace_locks,
        take_lock,
        wait_for_writers,
    )
    from zarrtrace.store.objects import Location, ObjectPath, locate, resolved
    from zarrtrace.store.reader import open_run, open_trace
    from zarrtrace.store.regular import own_file, read_regular
    from zarrtrace.store.run_index import IndexWriter, RunIndex, locked, write_index_layer
    from zarrtrace.store.summary import RunSummary, TraceSummary, summarize
    from zarrtrace.store.trace_writer import TraceWriter
    from zarrtrace.store.verification import Problem, verify
    from zarrtrace.store.writer import RunWriter

# Resolved on first use: a summary needs neither Zarr nor xarray, which take half a second.
_HOME = {
    "IndexWriter": "run_index",
    "IndexableTrace": "indexable",
    "Problem": "verification",
    "RunIndex": "run_index",
    "Location": "objects",
    "ObjectPath": "objects",
    "RunSummary": "summary",
    "RunWriter": "writer",
    "TOKENS": "attributes",
    "TraceSummary": "summary",
    "TraceWriter": "trace_writer",
    "copy_run": "copying",
    "indexable_traces": "indexable",
    "kind_of": "attributes",
    "only_writer": "locks",
    "locate": "objects",
    "locked": "run_index",
    "open_run": "reader",
    "open_trace": "reader",
    "read_features": "indexable",
    "read_token_texts": "indexable",
    "read_run_attributes": "attributes",
    "read_trace_attributes": "attributes",
    "refuse_foreign": "attributes",
    "remove_tree": "files",
    "take_lock": "locks",
    "replace_folder": "files",
    "read_regular": "regular",
    "own_file": "regular",
    "no_space": "files",
    "clear_errors": "files",
    "beside": "files",
    "resolved": "objects",
    "summarize": "summary",
    "remove_trace_locks": "locks",
    "verify": "verification",
    "wait_for_writers": "locks",
    "write_index_layer": "run_index",
    "write_whole": "files",
}

__all__ = [
    "TOKENS",
    "IndexWriter",
    "IndexableTrace",
    "Location",
    "ObjectPath",
    "Problem",
    "RunIndex",
    "RunSummary",
    "RunWriter",
    "TraceSummary",
    "TraceWriter",
    "beside",
    "clear_errors",
    "copy_run",
    "indexable_traces",
    "kind_of",
    "locate",
    "locked",
    "no_space",
    "only_writer",
    "open_run",
    "open_trace",
    "own_file",
    "read_features",
    "read_regular",
    "read_run_attributes",
    "read_token_texts",
    "read_trace_attributes",
    "refuse_foreign",
    "remove_trace_locks",
    "remove_tree",
    "replace_folder",
    "resolved",
    "summarize",
    "take_lock",
    "verify",
    "wait_for_writers",
    "write_index_layer",
    "write_whole",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zarrtrace.store' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zarrtrace.store.{_HOME[name]}"), name)
