"""Places to write to: what may be replaced there, and what is left alone."""

from __future__ import annotations

from typing import Any, Literal

from zarrtrace.errors import ConfigError, NotATraceError, StoreError
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store.damage import unknown_entries
from zarrtrace.store.journal import JOURNAL
from zarrtrace.store.metadata import Group, kind_of, not_ours, read_run, read_table

# Names in an error, at most.
_SHOWN = 5


def check_target(
    path: Location, wanted: Literal["run", "table"], *, overwrite: bool, repair: bool = False
) -> None:
    """Refuse a place where a run or a table cannot be written, before hours of work.

    Raises
    ------
    ConfigError, StoreError
    """
    refuse_inside(path, may_be_one=True)
    if repair:
        return
    refuse_foreign(path)
    refuse_kind(path, wanted, overwrite=overwrite)
    if overwrite:
        refuse_strangers(path)


def refuse_inside(path: Address, *, may_be_one: bool = False) -> None:
    """Refuse to write into a run, a trace or a table.

    Other files there do not belong to it, and are deleted with it when it is replaced. In an object
    store, where each look is a request, only the folder that `path` is in is looked at.

    Parameters
    ----------
    path
        The file or folder to write.
    may_be_one
        Whether `path` itself may be a run, a trace or a table.

    Raises
    ------
    ConfigError
    """
    place = locate(path).resolved()
    for folder in _above(place) if may_be_one else [place, *_above(place)]:
        if (kind := _kind_at(folder)) is not None:
            raise ConfigError(
                f"{path}: is in a {kind}",
                why=f"{folder} holds the files of a {kind} and nothing else: other files are "
                "deleted when it is replaced.",
                remedy="Choose a path outside that folder; nothing was changed.",
            )


def _above(place: Location) -> list[Location]:
    """Return the folders that a place is in, as far as looking at them is cheap."""
    if (path := place.path) is not None:
        return [locate(folder) for folder in path.parents]
    return [place.parent] if place.backend.writable else []


def _kind_at(folder: Location) -> str | None:
    """Return the kind of the group in a folder, None if zarrtrace wrote none there."""
    try:
        if not (folder / "zarr.json").is_file():
            return None
    except (OSError, StoreError):  # no permission to look
        return None
    try:
        return kind_of(folder)
    except NotATraceError:
        return None
    except StoreError:  # damaged, or of another version: nothing is written into that, either
        return "run"


def refuse_strangers(path: Location) -> None:
    """Refuse to replace a run or a table whose folder holds what does not belong to it.

    Raises
    ------
    StoreError
    """
    try:
        kind = kind_of(path)
        group: Group[Any] = read_table(path) if kind == "table" else read_run(path)
    except StoreError:  # nothing is there, or its metadata is damaged and does not say what it has
        return
    # Writers that were killed leave files whose names zarrtrace is a part of.
    names = [
        name
        for name in unknown_entries(group)
        if not (name.startswith(".") and "zarrtrace" in name)
        and not (kind == "table" and name == JOURNAL)
    ]
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise StoreError(
            f"{path}: holds what does not belong to the {kind}: {', '.join(names[:_SHOWN])}{more}",
            why=f"Something else wrote it there, and replacing the {kind} would delete it.",
            remedy="Move it away, or choose another --output; nothing was changed.",
        )


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
