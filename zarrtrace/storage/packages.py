"""Packages of the extra ``cloud``, imported when an address needs them."""

from __future__ import annotations

import importlib
from typing import Any

from zarrtrace.errors import ConfigError


def import_package(name: str, scheme: str) -> Any:
    """Import a package that an address needs.

    Raises
    ------
    ConfigError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{scheme}:// needs {name}, which is not installed",
            why="Runs on a disk do not need it, so it is an extra.",
            remedy=f"Install it: pip install {name}. The extra 'cloud' names all such packages.",
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0]
