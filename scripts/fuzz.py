"""Feed readers of strangers' files with nonsense for some minutes: only our own errors may come.

Runs the properties of ``tests/test_fuzz.py`` again and again, with new examples each time. With
``--guided`` (extra "fuzz"), atheris instead changes good files so that ever more of our code, and
of what parses for us, is reached: scenario files, metadata of NPZ folders, attributes and array
metadata of traces, their journals, NPZ files and the arrays in them.

    python scripts/fuzz.py [--minutes 10] [--guided]
"""

from __future__ import annotations

import argparse
import importlib
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

# What atheris watches: ours, and the parser written in Python.
_WATCHED = ["zarrtrace", "yaml"]


def with_hypothesis(folder: Path, seconds: float) -> None:
    """Run each property in turns until the time is up."""
    test_fuzz = importlib.import_module("test_fuzz")
    targets = importlib.import_module("fuzzing").Targets(folder)

    properties = {
        name: found for name, found in vars(test_fuzz).items() if name.startswith("test_")
    }
    rounds, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for test in properties.values():
            test(targets)
        rounds += 1
    print(f"{rounds} rounds of {', '.join(properties)}: nothing but our own errors")


def with_atheris(folder: Path, seconds: float) -> None:
    """Let coverage guide what is changed in good files; atheris ends the process."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=_WATCHED):
        fuzzing = importlib.import_module("fuzzing")
    targets = fuzzing.Targets(folder)
    readers: list[Callable[[bytes], None]] = [
        lambda content: targets.suite(content, ".yaml"),
        lambda content: targets.suite(content, ".jsonl"),
        lambda content: targets.layer(content, whole=True),
        lambda content: targets.layer(content, whole=False),
        targets.metadata_bytes,
        *(lambda content, name=name: targets.store_bytes(name, content) for name in fuzzing.FILES),
        # Deeper: one value of JSON that parses, and the seal or the checksum fits again.
        lambda content: targets.metadata(_replacing(atheris, fuzzing, content)),
        lambda content: targets.journal(
            content[0] if content else 0, _replacing(atheris, fuzzing, content[1:])
        ),
        *(
            lambda content, name=name: targets.store(name, _replacing(atheris, fuzzing, content))
            for name in fuzzing.FILES
        ),
    ]

    def one(content: bytes) -> None:
        if content:
            readers[content[0] % len(readers)](content[1:])

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(targets.seeds()):
        (corpus / str(number)).write_bytes(bytes([number]) + seed)
    options = {
        "max_total_time": f"{seconds:.0f}",
        "max_len": "20000",
        # Where what crashed it, or was slow, is kept.
        "artifact_prefix": f"{tempfile.gettempdir()}/zarrtrace-",
    }
    given = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *given, str(corpus)], one)
    atheris.Fuzz()


def _replacing(atheris: Any, fuzzing: Any, content: bytes) -> Callable[[Any], Any]:
    """Turn bytes into a change of JSON: a way down, and what to put there."""
    chosen = atheris.FuzzedDataProvider(content)
    way = [chosen.ConsumeIntInRange(0, 20) for _ in range(chosen.ConsumeIntInRange(1, 7))]

    def value(depth: int) -> Any:
        kinds: list[Callable[[], Any]] = [
            lambda: chosen.PickValueInList(fuzzing.AWKWARD),
            lambda: chosen.ConsumeInt(8),
            chosen.ConsumeFloat,
            lambda: chosen.ConsumeUnicode(5),
            lambda: [value(depth + 1) for _ in range(chosen.ConsumeIntInRange(0, 3))],
            lambda: {chosen.ConsumeUnicode(5): value(depth + 1)},
        ]
        return kinds[chosen.ConsumeIntInRange(0, len(kinds) - 1 if depth < 3 else 3)]()

    made = value(0)
    return lambda found: fuzzing.changed(found, way, made)


def main() -> None:
    """Fuzz."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--guided", action="store_true", help="By coverage, with atheris.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (with_atheris if given.guided else with_hypothesis)(Path(folder), 60 * given.minutes)


if __name__ == "__main__":
    main()
