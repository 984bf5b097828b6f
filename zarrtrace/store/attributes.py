"""What runs and traces say of themselves: reading and checking the attribute ``zarrtrace``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import zarr
from pydantic import ValidationError

from zarrtrace.errors import FormatVersionError, IncompleteError, IntegrityError, NotATraceError
from zarrtrace.spec import FORMAT_VERSION, NAMESPACE, RunAttributes, TraceAttributes

_Attributes = TypeVar("_Attributes", RunAttributes, TraceAttributes)


def read_run_attributes(path: str | Path) -> RunAttributes:
    """Read what a run says of itself.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _parse(RunAttributes, Path(path), "run")


def read_trace_attributes(path: str | Path) -> TraceAttributes:
    """Read what a trace says of itself.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _parse(TraceAttributes, Path(path), "trace")


def kind_of(path: str | Path) -> Literal["run", "trace"]:
    """Tell whether a folder is a run or a trace.

    Raises
    ------
    NotATraceError
        If it is neither.
    """
    kind = _namespace(Path(path), "run or a trace").get("kind")
    return "run" if kind == "run" else "trace"


def _namespace(path: Path, wanted: str) -> dict[str, Any]:
    if not path.exists():
        raise NotATraceError(
            f"{path}: no such folder", remedy=f"Give the folder of a {wanted}; check the path."
        )
    try:
        attributes = zarr.open_group(path, mode="r", use_consolidated=False).attrs
        found = attributes.get(NAMESPACE)
    except (zarr.errors.NodeNotFoundError, NotADirectoryError):
        found = None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path}/zarr.json: damaged: {error}",
            why="It is not the metadata that zarrtrace wrote.",
            remedy="Run 'zarrtrace verify', then extract again.",
        ) from error
    if not isinstance(found, dict):
        raise NotATraceError(
            f"{path}: exists, but is not a zarrtrace {wanted}",
            why="Its zarr.json is missing or lacks the attribute 'zarrtrace'.",
            remedy="Choose another path; nothing there was changed.",
        )
    version = found.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: format version {version}, this zarrtrace reads up to {FORMAT_VERSION}",
            why="It was written by a newer zarrtrace.",
            remedy="pip install --upgrade zarrtrace",
        )
    return found


def _parse(model: type[_Attributes], path: Path, wanted: str) -> _Attributes:
    found = _namespace(path, wanted)
    if found.get("kind") != wanted:
        raise NotATraceError(
            f"{path}: is a {found.get('kind')}, not a {wanted}",
            remedy="A run holds one trace a scenario; give the other folder.",
        )
    try:
        return model.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(
            f"{path}/zarr.json: attribute {NAMESPACE}.{where}: {first['msg']}",
            why="The attributes are not what zarrtrace writes.",
            remedy="Extract the scenario again, or restore the file from a copy.",
        ) from None


def incomplete(path: Path, attributes: TraceAttributes) -> IncompleteError:
    """Return the error that names what a trace lacks."""
    layers = ", ".join(map(str, attributes.missing_layers)) or "none"
    return IncompleteError(
        f"{path}: not complete: {len(attributes.missing_layers)} of {len(attributes.layers)} "
        f"layers missing ({layers})",
        why="The extraction was interrupted, or is still going on.",
        remedy="Run the same 'zarrtrace extract' again to go on, or open it with missing='nan'.",
    )
