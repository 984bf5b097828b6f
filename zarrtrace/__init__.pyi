from zarrtrace import analysis, figures, index, plot
from zarrtrace._version import __version__
from zarrtrace.analysis.samples import table
from zarrtrace.exports import export
from zarrtrace.extraction import extract, write_trace
from zarrtrace.imports import import_hidden
from zarrtrace.npz import import_npz
from zarrtrace.scenarios import Scenario, load_suite, span
from zarrtrace.store import copy_run as copy
from zarrtrace.store import open_run, open_table, open_trace, summarize, verify

__all__ = [
    "Scenario",
    "__version__",
    "analysis",
    "copy",
    "export",
    "extract",
    "figures",
    "import_hidden",
    "import_npz",
    "index",
    "load_suite",
    "open_run",
    "open_table",
    "open_trace",
    "plot",
    "span",
    "summarize",
    "table",
    "verify",
    "write_trace",
]
