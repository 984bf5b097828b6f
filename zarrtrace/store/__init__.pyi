from zarrtrace.store.array import open_array
from zarrtrace.store.captured import attention_problem, layer_record
from zarrtrace.store.chunks import Checksum
from zarrtrace.store.column_summary import ColumnSummary
from zarrtrace.store.continuations import (
    ContinuationFile,
    Repeat,
    remove_continuations,
    stored_continuations,
)
from zarrtrace.store.copy import copy_run
from zarrtrace.store.damage import Problem, check_sizes
from zarrtrace.store.index_arrays import IndexWriter, RunIndex, locked, write_index_layer
from zarrtrace.store.indexable import (
    Indexable,
    IndexableSamples,
    IndexableTrace,
    digest_of,
    read_indexable,
    read_run_or_table,
    read_sample_texts,
    read_special,
    read_token_texts,
)
from zarrtrace.store.label_file import (
    LABEL_COLUMNS,
    labelled_layers,
    read_label_file,
    write_label_file,
)
from zarrtrace.store.metadata import (
    kind_of,
    read_run,
    read_scenario,
    read_table,
    read_trace,
)
from zarrtrace.store.open import open_run, open_trace
from zarrtrace.store.publish import old_of, put_in_place
from zarrtrace.store.run_writer import RunWriter
from zarrtrace.store.staged import only_writer, read_staged, staging_folder, wait_for_writers
from zarrtrace.store.summary import (
    RunSummary,
    TableSummary,
    TraceSummary,
    summarize,
    summarize_table,
)
from zarrtrace.store.table_writer import TableWriter
from zarrtrace.store.tables import open_table
from zarrtrace.store.target import check_target, refuse_inside
from zarrtrace.store.trace_writer import TraceWriter, is_untouched
from zarrtrace.store.verification import verify
from zarrtrace.store.write import trace_plan, write_trace

__all__ = [
    "LABEL_COLUMNS",
    "Checksum",
    "ColumnSummary",
    "ContinuationFile",
    "IndexWriter",
    "Indexable",
    "IndexableSamples",
    "IndexableTrace",
    "Problem",
    "Repeat",
    "RunIndex",
    "RunSummary",
    "RunWriter",
    "TableSummary",
    "TableWriter",
    "TraceSummary",
    "TraceWriter",
    "attention_problem",
    "check_sizes",
    "check_target",
    "copy_run",
    "digest_of",
    "is_untouched",
    "kind_of",
    "labelled_layers",
    "layer_record",
    "locked",
    "old_of",
    "only_writer",
    "open_array",
    "open_run",
    "open_table",
    "open_trace",
    "put_in_place",
    "read_indexable",
    "read_label_file",
    "read_run",
    "read_run_or_table",
    "read_sample_texts",
    "read_scenario",
    "read_special",
    "read_staged",
    "read_table",
    "read_token_texts",
    "read_trace",
    "refuse_inside",
    "remove_continuations",
    "staging_folder",
    "stored_continuations",
    "summarize",
    "summarize_table",
    "trace_plan",
    "verify",
    "wait_for_writers",
    "write_index_layer",
    "write_label_file",
    "write_trace",
]
