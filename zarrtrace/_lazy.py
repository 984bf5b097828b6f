"""Public names of packages, imported when they are first used."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def lazy(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    Parameters
    ----------
    package
        Its ``__name__``.
    file
        Its ``__file__``. The stub beside it, ``__init__.pyi``, imports all public names; type
        checkers read the same stub.

    Returns
    -------
    tuple
        To be assigned to ``__getattr__`` and ``__dir__``.
    """

    @functools.cache
    def homes() -> dict[str, tuple[str, str]]:
        """Return module and name there of every public name."""
        import ast  # noqa: PLC0415 -- five milliseconds, and importing a package must be cheap

        with open(f"{file.rpartition('.')[0]}.pyi", encoding="utf-8") as stub:  # noqa: PTH123 -- as cheap
            statements = ast.parse(stub.read()).body
        return {
            alias.asname or alias.name: (str(statement.module), alias.name)
            for statement in statements
            if isinstance(statement, ast.ImportFrom)
            for alias in statement.names
        }

    def attribute(name: str) -> Any:
        if name == "__all__":  # "from package import *" asks for it
            return names()
        if name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, there = homes()[name]
        if module == package:  # a package or module inside it
            return importlib.import_module(f"{package}.{there}")
        return getattr(importlib.import_module(module), there)

    def names() -> list[str]:
        return sorted(homes())

    return attribute, names
