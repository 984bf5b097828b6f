from zarrtrace.extraction.call import extract
from zarrtrace.extraction.estimates import Estimate, estimate
from zarrtrace.extraction.job import DEMO_MODEL, Job, prepare
from zarrtrace.extraction.options import Loaded, Options
from zarrtrace.extraction.running import extract_run
from zarrtrace.store import write_trace

__all__ = [
    "DEMO_MODEL",
    "Estimate",
    "Job",
    "Loaded",
    "Options",
    "estimate",
    "extract",
    "extract_run",
    "prepare",
    "write_trace",
]
