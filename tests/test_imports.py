"""Imports: reading needs no torch, help very little, and dependencies are declared."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path

import fakes
import pytest

import zarrtrace

HEAVY = (
    "torch", "transformers", "sae_lens", "zarr", "xarray", "pydantic", "pandas", "matplotlib",
    "obstore",
)  # fmt: skip


def imported(code: str, *arguments: str) -> set[str]:
    """Return which of the heavy packages a program has imported when it ends."""
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: sys.stderr.write('HEAVY ' + ' '.join(set({HEAVY!r}) "
        "& set(sys.modules))))\n"
        f"{code}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert "HEAVY" in done.stderr, done.stderr
    return set(done.stderr.rpartition("HEAVY")[2].split())


CLI = "from zarrtrace.cli import main\nmain()"


_GARBAGE = """
import contextlib, gc, sys
from zarrtrace.errors import ConfigError
from zarrtrace.extraction.options import NOTHING_LOADED, Options
from zarrtrace.extraction.packages import capture_package
from zarrtrace.extraction.sae_sources import sae_source
from zarrtrace.machine import no_garbage

class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(gc.get_threshold()[0] > 0)
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Torch())
for call in (capture_package, lambda: sae_source(Options(), NOTHING_LOADED, None)):
    with contextlib.suppress(ConfigError, ModuleNotFoundError):
        call()
    print(gc.get_threshold()[0] > 0)
gc.set_threshold(0)
with no_garbage():
    pass
print(gc.get_threshold()[0] > 0)
"""


def test_imports_do_not_look_for_garbage() -> None:
    """Torch takes seconds, so that the import is broken off where it would begin."""
    done = subprocess.run(
        [sys.executable, "-c", _GARBAGE], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "False", "True", "False"]


def test_import_is_light() -> None:
    assert imported("import zarrtrace") == set()
    alone = "import sys; old = {*sys.modules}; import zarrtrace; print(len({*sys.modules} - old))"
    found = subprocess.run(
        [sys.executable, "-Sc", alone], cwd=ROOT, capture_output=True, check=True
    )
    assert int(found.stdout) < 10  # neither typing nor functools


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["extract", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    assert imported(CLI, *arguments) == set()


def test_reading_needs_no_torch(shared_run: fakes.FakeRun, tmp_path: Path) -> None:
    run = str(shared_run.path)
    assert imported(CLI, "info", run) == {"pydantic"}
    program = (
        "import zarrtrace\nfrom zarrtrace.cli import group\n"
        f"group.main(['verify', {run!r}], standalone_mode=False)\n"
        f"group.main(['export', {run!r}, '-o', {str(tmp_path / 'npz')!r}], standalone_mode=False)\n"
        f"zarrtrace.open_run({run!r})"
    )
    read = imported(program)
    assert "xarray" in read
    assert not read & {"torch", "transformers", "sae_lens", "obstore"}


# --- public names ------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
#: Names that users type after ``zt.``
PUBLIC = {
    "Scenario", "__version__", "analysis", "copy", "export", "extract", "figures",
    "import_hidden", "import_npz", "index", "load_suite", "open_run", "open_table", "open_trace",
    "plot", "span", "summarize", "table", "verify", "write_trace",
}  # fmt: skip


def test_dir_lists_what_users_call_and_nothing_else() -> None:
    code = (
        "import zarrtrace as zt; print(*dir(zt)); print(*dir(zt.index)); print(*dir(zt.analysis))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    top, index, analysis = (set(line.split()) for line in done.stdout.splitlines())
    assert top == PUBLIC
    assert index == {
        "FeatureUse", "IndexUpdate", "LabelUpdate", "TokenUse", "build_index", "find_feature",
        "names_of", "read_labels", "write_labels",
    }  # fmt: skip
    assert {"contrast", "decision", "attention_to"} < analysis
    assert not {name for name in analysis if name.startswith("_")}
    assert not analysis & {"importlib", "TYPE_CHECKING", "Any", "annotations", "lazy", "bands"}


def test_every_analysis_states_its_null_or_that_it_has_none() -> None:
    from zarrtrace import analysis

    other = {"of_sae", "read_table", "table", "chose"}  # they make what analyses take
    for name in {*dir(analysis)} - other:
        if not inspect.isfunction(getattr(analysis, name)):
            continue
        notes = (inspect.getdoc(getattr(analysis, name)) or "").partition("Notes\n-----")[2]
        assert re.search(r"\bnulls?\b|\bno test\b", notes, re.IGNORECASE), name
        assert re.search(
            r"\b(unit|scenarios?|groups?|prompts?|repeats?|samples?)\b", notes, re.IGNORECASE
        ), name


@pytest.mark.parametrize(
    "package",
    [
        pytest.param("zarrtrace", marks=pytest.mark.torch),  # for zt.extract
        "zarrtrace.analysis",
        "zarrtrace.figures",
        "zarrtrace.index",
        "zarrtrace.store",
    ],
)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    for name in dir(module):
        found = getattr(module, name)
        assert found is not None
        assert inspect.getdoc(found), name
    with pytest.raises(AttributeError, match=rf"module '{package}' has no attribute 'no_such'"):
        _ = module.no_such
    assert set(module.__all__) == set(dir(module))


def test_version_is_that_of_the_package() -> None:
    assert zarrtrace.__version__ == version("zarrtrace")


def test_the_proof_can_fail() -> None:
    assert "xarray" in imported("import zarrtrace, xarray")


# --- declared in pyproject.toml ----------------------------------------------------------------

#: Extras that may be imported at the top of what is below a path; the longest path counts. Within
#: functions, all of zarrtrace may import what any of its extras installs.
EXTRAS = {
    "zarrtrace": (),
    "zarrtrace/capture": ("extract",),
    "zarrtrace/extraction": ("cluster",),
    "zarrtrace/viewer/widget.py": ("notebook",),
    "tests": ("test",),
    "scripts": ("test", "dev"),
}
OF_ZARRTRACE = ("extract", "cluster", "cloud", "notebook", "probe")
#: Used where it is installed, and not asked for.
OPTIONAL = {"dask-cuda"}
#: Runs in an environment of its own, which it makes.
ELSEWHERE = ("scripts/bench/peer_tools.py",)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(project: dict[str, object], *extras: str) -> set[str]:
    """Return the distributions that the package and some of its extras ask for."""
    lists: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    wanted = [*project["dependencies"], *(one for extra in extras for one in lists[extra])]  # type: ignore[misc]
    out: set[str] = set()
    for requirement in wanted:
        parts = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
        assert parts is not None
        if parts[1] == "zarrtrace":
            out |= declared(project, *parts[2].split(","))
        else:
            out.add(canonical(parts[1]))
    return out


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield what a module imports, and whether it does so whenever it is imported itself."""

    def visit(node: ast.AST, *, at_top: bool) -> Iterator[tuple[str, bool]]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            names = [node.args[0].value] if called in ("import_module", "importorskip") else []
        yield from ((name.partition(".")[0], at_top) for name in names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_top=at_top and not inside)

    yield from visit(ast.parse(source), at_top=True)


distributions = cache(packages_distributions)  # which takes a second


def undeclared(file: str, source: str, project: dict[str, object]) -> set[str]:
    """Return the distributions that a file of the repository imports without a right to."""
    below = max((path for path in EXTRAS if f"{file}/".startswith(f"{path}/")), key=len)
    top = EXTRAS[below]
    lazily = (*top, *OF_ZARRTRACE) if below.startswith("zarrtrace") else top
    own = {
        path.stem
        for folder in ("tests", "scripts", "scripts/bench")
        for path in (ROOT / folder).glob("*.py")
    }
    known = distributions()
    out: set[str] = set()
    for module, at_top in imports(source):
        if module in sys.stdlib_module_names or module == "zarrtrace":
            continue
        if module in own and not file.startswith("zarrtrace/"):
            continue
        found = {canonical(one) for one in known.get(module, [module])} - OPTIONAL
        if found and not found & declared(project, *(top if at_top else lazily)):
            out |= found
    return out


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


@pytest.mark.long
def test_all_that_is_imported_is_declared(project: dict[str, object]) -> None:
    found = {}
    for file in sorted(path for top in EXTRAS for path in (ROOT / top).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if name not in ELSEWHERE and (missing := undeclared(name, file.read_text(), project)):
            found[name] = missing
    assert found == {}


@pytest.mark.parametrize(
    ("file", "source", "missing"),
    [
        ("zarrtrace/store/one.py", "import filelock", {"filelock"}),
        ("zarrtrace/store/one.py", "import torch", {"torch"}),
        ("zarrtrace/store/one.py", "def f():\n    import obstore.store, requests", {"requests"}),
        ("zarrtrace/capture/one.py", "import torch, yaml\nfrom PIL import Image", {"pillow"}),
        ("zarrtrace/capture/one.py", "from . import other", set()),
        ("zarrtrace/one.py", "import fakes", {"fakes"}),
        ("tests/test_one.py", "import fakes, ruff", {"ruff"}),
        ("scripts/one.py", "importlib.import_module('ruff')\nimport nnsight", {"nnsight"}),
    ],
)
def test_what_is_not_declared_is_found(
    project: dict[str, object], file: str, source: str, missing: set[str]
) -> None:
    assert undeclared(file, source, project) == missing


@pytest.mark.parametrize("name", ["constraints", "constraints-matrix"])
def test_what_is_declared_is_pinned(project: dict[str, object], name: str) -> None:
    extras = ("test", "dev") if name == "constraints" else ("test-core",)
    lines = (ROOT / f"scripts/{name}.txt").read_text().splitlines()
    pinned = {canonical(line.split("==")[0]) for line in lines if "==" in line}
    assert declared(project, *extras) - pinned == set()
