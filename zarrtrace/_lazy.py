"""Public names of packages, imported when they are first used."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # typing itself would take most of the time that importing zarrtrace takes
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def lazy(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package that imports names on first use.

    Not lazy_loader 0.6, which knows no ``as`` and no other package in a stub, and parses stubs
    when packages are imported: with ast it takes 18 ms to import, zarrtrace as a whole 5 ms.

    Parameters
    ----------
    package
        Its ``__name__``.
    file
        Its ``__file__``. The stub beside it, ``__init__.pyi``, imports all public names; type
        checkers read the same stub.
    """
    homes: dict[str, tuple[str, str]] = {}  # by public name: the module, and the name there

    def names() -> list[str]:
        if not homes:
            homes.update(_imports_of(f"{file.rpartition('.')[0]}.pyi"))
        return sorted(homes)

    def attribute(name: str) -> Any:
        known = names()
        if name == "__all__":  # "from package import *" asks for it
            return known
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, there = homes[name]
        if module == package:  # a package or module inside it
            return importlib.import_module(f"{package}.{there}")
        return getattr(importlib.import_module(module), there)

    return attribute, names


def _imports_of(stub: str) -> dict[str, tuple[str, str]]:
    """Return module and name there of every name that a stub imports."""
    import ast  # noqa: PLC0415 -- five milliseconds, and importing a package must be cheap

    with open(stub, encoding="utf-8") as file:  # noqa: PTH123 -- pathlib takes as long
        statements = ast.parse(file.read()).body
    return {
        alias.asname or alias.name: (str(statement.module), alias.name)
        for statement in statements
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
