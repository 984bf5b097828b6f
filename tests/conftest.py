"""Fixtures that several test modules share."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

import fakes

settings.register_profile(
    "zarrtrace",
    deadline=None,  # two busy cores: time says nothing
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("zarrtrace")

#: Where torch is not installed, modules that import it at their top.
collect_ignore = (
    [
        file.name
        for file in Path(__file__).parent.glob("test_*.py")
        if "\npytestmark = pytest.mark.torch" in file.read_text(encoding="utf-8")
    ]
    if importlib.util.find_spec("torch") is None
    else []
)


def pytest_report_header() -> list[str]:
    """Say what is not run."""
    return [f"no torch here, not collected: {', '.join(sorted(collect_ignore))}"][
        : len(collect_ignore)
    ]


_watchers: list[list[str]] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _watchers and event == "open" and isinstance(arguments[0], str | os.PathLike):
        for watcher in _watchers:
            watcher.append(os.fspath(arguments[0]))


sys.addaudithook(_audit)


@pytest.fixture
def opened_files() -> Iterator[list[str]]:
    """Paths of all files opened since (or since its last ``clear()``), in any thread."""
    watcher: list[str] = []
    _watchers.append(watcher)
    yield watcher
    _watchers.remove(watcher)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    """A complete run that no test may change."""
    return fakes.make_run(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def run(tmp_path: Path) -> fakes.FakeRun:
    """A complete run of the test's own."""
    return fakes.make_run(tmp_path)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extract the main job, the embedded model over its ten scenarios, which no test may change."""
    from zarrtrace.extraction import extract

    return extract(tmp_path_factory.mktemp("demo") / "runs" / "demo")
