"""npm packages that tests need, in tests/node_modules, which git ignores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

HERE = Path(__file__).parent
# Installed together: npm removes packages that are not asked for.
PACKAGES = {"zarrita": "0.7.5", "axe-core": "4.14.1"}


def _not_run(why: str) -> NoReturn:
    if os.environ.get("ZARRTRACE_REQUIRE_NODE"):
        pytest.fail(why)
    pytest.skip(f"no packages of npm: {why}")


def _is_there(name: str, version: str) -> bool:
    package = HERE / "node_modules" / name / "package.json"
    return package.exists() and json.loads(package.read_text())["version"] == version


def install() -> Path:
    """Return the folder of the packages, installed if need be; skip the test without npm."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        _not_run("node and npm are not installed")
    if not all(_is_there(*package) for package in PACKAGES.items()):
        done = subprocess.run(
            ["npm", "install", "--prefix", HERE, "--no-save", "--no-package-lock", "--no-audit",
             "--no-fund", *(f"{name}@{version}" for name, version in PACKAGES.items())],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            _not_run(f"npm could not install them: {done.stderr[-300:]}")
    return HERE / "node_modules"
