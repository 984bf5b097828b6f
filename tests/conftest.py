"""Fixtures that several test modules share."""

from __future__ import annotations

import builtins
import gc
import importlib.util
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

import fakes

# As many of torch's threads in every process that tests start: another number of them may cut a
# matrix product otherwise, and tests compare what processes store bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

# Until all tests are collected: nearly all that importing makes stays. Not gc.disable(), because
# Dask asks while it is imported whether the collector is enabled, and would always disable it.
_THRESHOLD = gc.get_threshold()
gc.set_threshold(0)

settings.register_profile(
    "zarrtrace",
    deadline=None,  # two busy cores: time says nothing
    max_examples=100 if "CI" in os.environ else 30,  # others every day
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("zarrtrace")

#: Where torch is not installed, modules that import it at their top.
collect_ignore = (
    [
        file.name
        for file in Path(__file__).parent.glob("test_*.py")
        if re.search(
            r"^pytestmark = \[?pytest\.mark\.torch", file.read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    if importlib.util.find_spec("torch") is None
    else []
)


def pytest_report_header() -> list[str]:
    """Say what is not run."""
    return [f"no torch here, not collected: {', '.join(sorted(collect_ignore))}"][
        : len(collect_ignore)
    ]


#: Files whose tests take longest. They are begun first, so that no core waits for one at the end.
_LONG = (
    "test_faults.py",
    "test_cluster.py",
    "test_distributed.py",
    "test_objects.py",
    "test_families.py",
    "test_cli.py",
    "test_https.py",
    "test_mission.py",
    "test_viewer_page.py",
    "test_notebook.py",
    "test_documents.py",
    "test_figures.py",
    "test_sae_kinds.py",
    "test_blocked.py",
    "test_store.py",
    "test_extract_call.py",
    "test_architectures.py",
    "test_bad_input.py",
)


#: Files of long tests that another version of Python or zarr may change: they read through zarr,
#: or send objects to other processes. The rest are about servers, kills, pages and statistics.
_OF_VERSIONS = (
    "test_accessors.py",
    "test_distributed.py",
    "test_exports.py",
    "test_faults.py",
    "test_fuzz.py",
    "test_hostile.py",
    "test_imports.py",
    "test_store.py",
    "test_tables.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `scripts/test --matrix`."""
    parser.addoption(
        "--versions",
        action="store_true",
        help="Of long tests, run those alone that another version of Python or zarr may change.",
    )


def pytest_collection_finish() -> None:
    """Look for garbage again, but not among what is there."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLD)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first; within a file the order stays."""

    def place(item: pytest.Item) -> int:
        return _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG)

    items.sort(key=place)
    if config.getoption("--versions"):
        same = [
            item
            for item in items
            if item.get_closest_marker("long") and item.path.name not in _OF_VERSIONS
        ]
        config.hook.pytest_deselected(items=same)
        items[:] = [item for item in items if item not in same]


@pytest.fixture
def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of all files opened since (or since its last ``clear()``), in any thread."""
    # Not by an audit hook, which cannot be taken away again.
    watcher: list[str] = []

    def watched(opener: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(file, str | os.PathLike):
                watcher.append(os.fspath(file))
            return opener(file, *arguments, **options)

        return call

    monkeypatch.setattr(os, "open", watched(os.open))
    monkeypatch.setattr(io, "open", watched(io.open))
    monkeypatch.setattr(builtins, "open", watched(builtins.open))
    return watcher


@pytest.fixture
def chunk_reads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chunks of stores read since (or since its last ``clear()``), in any thread."""
    from chunk_reads import ChunkReads

    return ChunkReads(monkeypatch)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    """A complete run that no test may change."""
    return fakes.make_run(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def run(tmp_path: Path, shared_run: fakes.FakeRun) -> fakes.FakeRun:
    """A complete run of the test's own: a copy, which takes a tenth of the time."""
    shutil.copytree(shared_run.path, tmp_path / shared_run.path.name)
    return shared_run._replace(path=tmp_path / shared_run.path.name)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of object storage; see ``s3_servers.py``."""
    import s3_servers

    if not s3_servers.BIN.is_dir() and "ZARRTRACE_REQUIRE_SERVERS" not in os.environ:
        pytest.skip("no .venv-servers (scripts/servers.sh makes it)")
    with s3_servers.serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def s3(s3_server: Any) -> Iterator[Any]:
    """The same, without what earlier tests left of requests and faults."""
    import s3_servers

    # Again: Dask's nannies put the environment back as it was before they started a worker.
    os.environ.update(s3_servers.CREDENTIALS)
    s3_server.proxy.seen.clear()
    yield s3_server
    s3_server.proxy.fault = lambda _: None


@pytest.fixture
def hub_home(tmp_path: Path, shared_hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local cache of the hub with what README names; of the test's own, and read here too."""
    found = tmp_path / "home"
    shutil.copytree(shared_hub, found, symlinks=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(found / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(found / "hub"))  # read before that is imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; a test run that must have it says so in ZARRTRACE_REQUIRE_BROWSER."""
    required = os.environ.get("ZARRTRACE_REQUIRE_BROWSER") == "1"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        if required:
            raise
        pytest.skip("needs playwright: pip install '.[test]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        message = "needs a browser: apt-get install chromium"
        pytest.fail(message) if required else pytest.skip(message)
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # containers have 64 MB there, and a page that needs more dies
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small random models, saved and loaded once for all tests, which put back what they change."""
    from architectures import Models  # imports torch

    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extract the main job, the embedded model over its ten scenarios, which no test may change."""
    from zarrtrace.extraction import extract_run

    return made_once(tmp_path_factory, "runs/demo", extract_run)


@pytest.fixture(scope="session")
def shared_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cache of the hub with what README names, which no test may change."""
    import hub_cache  # imports torch

    return made_once(tmp_path_factory, "huggingface", hub_cache.fill)


def made_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """Return a folder that the first of pytest's processes to need it makes for all."""
    from filelock import FileLock

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.made")):
        if not folder.exists():
            make(folder)
    return folder
