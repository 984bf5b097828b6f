"""Imports of the fork server: what workers of this machine need, before they are forked."""

import gc
import importlib
import os
from contextlib import suppress

from zarrtrace.extraction.packages import capture_package
from zarrtrace.extraction.writer_template import die_with

_THRESHOLD = gc.get_threshold()


def _look_for_garbage() -> None:
    gc.freeze()  # what a worker begins with is none
    gc.set_threshold(*_THRESHOLD)


die_with(os.getppid())  # it would notice only after the imports
gc.set_threshold(0)  # as in machine.no_garbage
os.register_at_fork(after_in_child=_look_for_garbage)
with suppress(Exception):  # workers say what cannot be imported
    importlib.import_module("zarrtrace.extraction.worker")
    capture_package()
