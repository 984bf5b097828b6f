"""The main job: scenarios in, one labelled Zarr store each out."""

from zarrtrace.extraction.estimate import Estimate, estimate
from zarrtrace.extraction.job import DEMO_MODEL, Job, Options, prepare
from zarrtrace.extraction.running import extract

__all__ = [
    "DEMO_MODEL",
    "Estimate",
    "Job",
    "Options",
    "estimate",
    "extract",
    "prepare",
]
