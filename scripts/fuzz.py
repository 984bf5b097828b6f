"""Feed readers of strangers' files with nonsense for some minutes: only our own errors may come.

Runs the properties of ``tests/test_fuzz.py`` again and again, with new examples each time. With
atheris installed, it is guided by coverage and feeds bytes to the readers of YAML, JSONL and NPZ.

    python scripts/fuzz.py [--minutes 10]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

settings.register_profile(
    "fuzz",
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fuzz")


def with_hypothesis(targets: Any, seconds: float) -> None:
    """Run each property in turns until the time is up."""
    test_fuzz = importlib.import_module("test_fuzz")

    properties = {
        name: found for name, found in vars(test_fuzz).items() if name.startswith("test_")
    }
    rounds, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for test in properties.values():
            test(targets)
        rounds += 1
    print(f"{rounds} rounds of {', '.join(properties)}: nothing but our own errors")


def with_atheris(targets: Any, seconds: float) -> None:
    """Let coverage guide bytes; atheris ends the process."""
    atheris = importlib.import_module("atheris")

    readers: list[Callable[[bytes], None]] = [
        lambda content: targets.suite(content, ".yaml"),
        lambda content: targets.suite(content, ".jsonl"),
        lambda content: targets.layer(content, whole=True),
        lambda content: targets.layer(b"\x93NUMPY\x01\x00" + content, whole=False),
    ]

    def one(content: bytes) -> None:
        if content:
            readers[content[0] % len(readers)](content[1:])

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds:.0f}"], one)
    atheris.Fuzz()


def main() -> None:
    """Fuzz."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    seconds = 60 * parser.parse_args().minutes
    fuzzing = importlib.import_module("fuzzing")
    with tempfile.TemporaryDirectory() as folder:
        targets = fuzzing.Targets(Path(folder))
        guided = importlib.util.find_spec("atheris") is not None
        (with_atheris if guided else with_hypothesis)(targets, seconds)


if __name__ == "__main__":
    main()
