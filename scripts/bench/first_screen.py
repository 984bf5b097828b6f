"""Measure how soon the command line shows something.

Each command runs in a process of its own, several times in turns: until it ends for help, until its
first line for an extraction, which is then killed. Wall time depends on what else the machine does;
CPU time is that of the process until then. The limits are those of the project, on a quiet machine.

    python scripts/bench/first_screen.py [--repeats 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class Screen(NamedTuple):
    """A command and the seconds within which it must show something.

    Attributes
    ----------
    name
        Of the row.
    arguments
        Of the command line; ``RUN`` is a folder that does not exist.
    limit
        Seconds of wall time; None for none.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float | None = None


SCREENS = (
    Screen("python -c pass, for comparison", ()),
    Screen("zarrtrace --help", ("--help",), 0.15),
    Screen("zarrtrace extract --help", ("extract", "--help")),
    Screen("first line of zarrtrace extract", ("extract", "-o", "RUN"), 1.0),
    Screen("unknown scenario", ("extract", "-o", "RUN", "--scenario", "nobody")),
)


def first_line(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Return the seconds of wall and CPU time until a command shows a line, or ends without."""
    command = [sys.executable, "-m", "zarrtrace", *arguments]
    if not arguments:
        command = [sys.executable, "-c", "pass"]
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        if process.stdout is None:
            raise RuntimeError("no pipe")
        if "--help" in arguments or not arguments:
            process.stdout.read()
        else:
            process.stdout.readline()
        wall = time.perf_counter() - start
        os.kill(process.pid, signal.SIGKILL)  # Popen.kill might wait for it, and its times are lost
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
    return wall, used.ru_utime + used.ru_stime


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="Write all times there, too.")
    given = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {screen.name: [] for screen in SCREENS}
    with tempfile.TemporaryDirectory(prefix="zarrtrace-bench-") as scratch:
        run = str(Path(scratch) / "run")
        for _ in range(given.repeats):
            for screen in SCREENS:
                arguments = tuple(run if one == "RUN" else one for one in screen.arguments)
                times[screen.name].append(first_line(arguments))
    print("| command | wall s | least | CPU s | limit |\n|---|---|---|---|---|")
    for screen in SCREENS:
        wall, cpu = zip(*times[screen.name], strict=True)
        limit = "" if screen.limit is None else f"{screen.limit:.2f}"
        print(
            f"| {screen.name} | {statistics.median(wall):.2f} | {min(wall):.2f} "
            f"| {statistics.median(cpu):.2f} | {limit} |"
        )
    if given.json:
        given.json.write_text(json.dumps(times, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
