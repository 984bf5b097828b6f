"""Imports of the fork server: what workers of this machine need, before they are forked."""

import importlib
import os
from contextlib import suppress

from zarrtrace.extraction.packages import capture_package
from zarrtrace.extraction.writer_template import die_with

die_with(os.getppid())  # it would notice only after the imports
with suppress(Exception):  # workers say what cannot be imported
    importlib.import_module("zarrtrace.extraction.worker")
    capture_package()
