"""Names of scenarios, which become folders and Zarr nodes, and of what stands in them."""

from __future__ import annotations

import re
import unicodedata

from zarrtrace.errors import ScenarioError

#: The span that every scenario has: its last token, where the model decides what to say next.
DECISION = "decision"

#: Names of spans, values, marks and metadata.
IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"

_SAFE_NAME = re.compile(r"[^\W_][\w.\-]*")
_DEVICE_NAMES = frozenset(
    {"con", "prn", "aux", "nul", "clock$"}
    | {f"{port}{i}" for port in ("com", "lpt") for i in range(10)}
)
_RESERVED_NAMES = frozenset({"zarr.json", "index"}) | _DEVICE_NAMES
_MAX_NAME = 100


def check_name(name: str) -> str:
    """Return `name` if it is safe as a folder and Zarr node name.

    Raises
    ------
    ScenarioError
        If it is empty, too long, reserved, or could leave its folder.
    """
    rule = (
        "A name starts with a letter or digit and goes on with letters, digits, '_', '-' or '.', "
        f"at most {_MAX_NAME} in all; it becomes a folder of the run."
    )
    problem = ""
    if not name:
        problem = "is empty"
    elif len(name.encode("utf-8", "replace")) > _MAX_NAME:
        problem = f"is longer than {_MAX_NAME} bytes"
    elif not _SAFE_NAME.fullmatch(name) or name.endswith("."):
        problem = "is not safe as a folder name"
    elif unicodedata.normalize("NFC", name) != name:
        problem = "is not in Unicode normal form NFC"
    elif name.casefold() in _RESERVED_NAMES or name.casefold().split(".")[0] in _DEVICE_NAMES:
        problem = "is reserved"
    if problem:
        shown = ascii(name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}...")
        raise ScenarioError(f"scenario name {shown} {problem}", remedy=rule)
    return name


def name_key(name: str) -> str:
    """Return what two names share if a file system may take them for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def default_name(place: int) -> str:
    """Name a scenario without a name by its place in the suite, counted from 0."""
    return f"scenario_{place}"


def label(name: str) -> str:
    """Return what messages call a scenario; `name` is empty until a suite names it."""
    return f"scenario {name!r}" if name else "the scenario"
