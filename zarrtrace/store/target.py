"""Places to write to: what may be replaced there, and what is left alone."""

from __future__ import annotations

from typing import Literal

from zarrtrace.errors import NotATraceError
from zarrtrace.storage import Location
from zarrtrace.store.metadata import kind_of, not_ours


def refuse_foreign(path: Location) -> None:
    """Refuse to write where something exists that is not a run, or where nothing can be written.

    Raises
    ------
    ConfigError, NotATraceError, FormatVersionError, IntegrityError
    """
    path.writable_backend()  # raises if it is read only
    is_file = path.is_file()
    if not is_file and not (path.is_folder() and any(True for _ in path.children())):
        return
    if is_file or (path.path is not None and not (path / "zarr.json").is_file()):
        why = "It is a file; a run is a folder." if is_file else "It has no zarr.json."
        raise not_ours(path, "run or trace", why)
    kind_of(path)


def refuse_kind(path: Location, wanted: Literal["run", "table"], *, overwrite: bool) -> None:
    """Refuse to write a run where a table is, or a table where a run is, unless to replace it.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    if not (path / "zarr.json").is_file():
        return
    kind = kind_of(path)
    if kind == wanted or (overwrite and kind != "trace"):
        return
    names = {"run": "a run", "table": "a table", "trace": "a trace"}
    replacing = ", or replace it with --overwrite" if kind != "trace" else ""
    raise NotATraceError(
        f"{path}: is {names[kind]}, not {names[wanted]}",
        why=f"This command writes {names[wanted]}, with --layout "
        f"{'traces' if wanted == 'run' else 'table'}.",
        remedy=f"Choose another --output{replacing}.",
    )
