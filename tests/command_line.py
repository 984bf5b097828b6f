"""The command line in the test's own process, which has its imports already."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest

from zarrtrace.cli import main


def call(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; the result is that of a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with (
        unittest.mock.patch.object(sys, "argv", ["zarrtrace", *map(str, arguments)]),
        unittest.mock.patch.object(sys, "excepthook", sys.excepthook),  # main() sets its own
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    code = int(ended.value.code or 0)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())
