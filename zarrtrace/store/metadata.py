"""``zarr.json`` of groups: written, sealed, read and checked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from pydantic import ValidationError

from zarrtrace.errors import (
    FormatVersionError,
    IntegrityError,
    NotATraceError,
    ScenarioError,
)
from zarrtrace.format.attributes import FORMAT_VERSION, RunAttributes, TraceAttributes
from zarrtrace.format.index_layout import IndexAttributes
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.scenarios import check_name, check_trace_name
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store.chunks import Checksum
from zarrtrace.store.codecs import ArrayEncoding
from zarrtrace.store.nodes import NONSENSE, Nodes, check_array, stored_checksums
from zarrtrace.store.seal import GROUP, AnyAttributes, coordinate_names, seal_holds
from zarrtrace.suggestions import closest_path

Kind = Literal["run", "trace", "table", "index"]
#: Remedy for a damaged file.
REPAIR = (
    "'zarrtrace verify' names everything damaged; the 'zarrtrace extract' that made the run, with "
    "--repair, computes it again."
)
_ELSEWHERE = "Choose another path; nothing there was changed."
# No zarr.json has more bytes.
_MOST_BYTES = 2**30
# Remedies for a group of another kind than was asked for.
_OTHER_KIND = {
    "table": "A table holds samples of many scenarios: open it with zarrtrace.open_table.",
    "run": "A run holds one trace a scenario: open it with zarrtrace.open_run.",
    "trace": "A run holds one trace a scenario: open one with zarrtrace.open_trace.",
}
_Use = TypeVar("_Use")
_Attributes = TypeVar(
    "_Attributes", IndexAttributes, RunAttributes, TableAttributes, TraceAttributes
)
_MODELS: dict[str, type[AnyAttributes]] = {
    "run": RunAttributes,
    "trace": TraceAttributes,
    "table": TableAttributes,
    "index": IndexAttributes,
}


@dataclass(frozen=True)
class Group(Generic[_Attributes]):
    """A group as its ``zarr.json`` describes it.

    Attributes
    ----------
    path
        Its folder.
    attributes
        Its checked attributes.
    plain
        All of its attributes but the names of coordinates, as xarray shows them.
    labels
        Names of the coordinates that are no index.
    nodes
        Metadata of its arrays; of a run, of everything below it.
    encodings
        How its arrays are cut and encoded; empty for a run.
    """

    path: Location
    attributes: _Attributes
    plain: dict[str, Any]
    labels: frozenset[str]
    nodes: Nodes
    encodings: Mapping[str, ArrayEncoding]

    @cached_property
    def checksums(self) -> dict[str, dict[str, Checksum]]:
        """Sizes and checksums of its arrays' files, by array and key."""
        return {name: stored_checksums(self.nodes[name]) for name in self.encodings}


# --- writing -----------------------------------------------------------------------------------


def repeated_nodes(trace: Group[TraceAttributes]) -> Nodes:
    """Return what a run repeats of a trace's metadata, by path below the trace."""
    group = {
        "attributes": {**trace.plain, "coordinates": coordinate_names(trace.nodes)},
        **GROUP,
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": {}},
    }
    return {"": group, **trace.nodes}


# --- reading -----------------------------------------------------------------------------------


def read_run(path: Address) -> Group[RunAttributes]:
    """Read the metadata of a run.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _read(locate(path), "run")


def read_trace(path: Address, *, by_seal: bool = False) -> Group[TraceAttributes]:
    """Read the metadata of a trace.

    With `by_seal` a seal that holds is enough: arrays' metadata is not compared with the format,
    and `encodings` are left empty.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _read(locate(path), "trace", by_seal=by_seal)


def read_table(path: Address) -> Group[TableAttributes]:
    """Read the metadata of a table.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _read(locate(path), "table")


def read_scenario(run: Location, name: str, *, by_seal: bool = False) -> Group[TraceAttributes]:
    """Read the metadata of a run's trace, which must be the one that its folder names.

    `by_seal` is that of :func:`read_trace`.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    trace = read_trace(run / name, by_seal=by_seal)
    if trace.attributes.name != name:
        raise IntegrityError(
            f"{run / name}: holds scenario {trace.attributes.name!r}",
            why="Folders of the run were renamed or exchanged.",
            remedy="Rename them back, or let the 'zarrtrace extract' that made the run write them "
            "again, with --repair.",
        )
    return trace


def each_trace(
    run: Location,
    names: Iterable[str],
    use: Callable[[Group[TraceAttributes]], _Use],
    *,
    by_seal: bool = False,
) -> list[_Use | None]:
    """Return what a function makes of each trace's metadata; None for those not complete.

    `by_seal` is that of :func:`read_trace`.

    Raises
    ------
    FormatVersionError, IntegrityError
    """

    def used(name: str) -> _Use | None:
        try:
            return use(read_scenario(run, name, by_seal=by_seal))
        except NotATraceError:
            return None

    return run.each(used, names)


def read_index_group(path: Address) -> Group[IndexAttributes]:
    """Read the metadata of a run's index.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _read(locate(path), "index")


def kind_of(path: Address) -> Literal["run", "trace", "table"]:
    """Tell whether a folder is a run, a trace or a table.

    Raises
    ------
    NotATraceError
        If it is none of them.
    FormatVersionError, IntegrityError
    """
    _, group = _load(location := locate(path), "run or a trace")
    kind: Literal["run", "trace", "table"] = group["attributes"]["kind"]
    if kind not in ("run", "trace", "table"):
        raise _other_kind(location, kind, "run or a trace")
    return kind


def _not_there(path: Location, wanted: str) -> NotATraceError:
    """Say why no ``zarr.json`` is at a path, and where one is that may be meant."""
    if not path.exists():
        near = None if path.path is None else closest_path(path.path)
        return NotATraceError(
            f"{path}: no such folder",
            remedy=f"Did you mean {str(near)!r}?"
            if near is not None
            else f"Give the folder of a {wanted}; check the path.",
        )
    if path.is_file():
        return NotATraceError(
            f"{path}: is a file, not the folder of a {wanted}",
            why="A run is a folder that holds zarr.json and a folder for each scenario.",
            remedy="Give that folder; nothing was changed.",
        )
    runs: list[str] = []
    if path.path is not None:
        with contextlib.suppress(OSError):
            runs = [str(one) for one in path.children() if (one / "zarr.json").is_file()]
    remedy = _ELSEWHERE if not runs else f"It holds runs or traces: {', '.join(runs[:5])}."
    if len(runs) == 1:
        remedy = f"Did you mean {runs[0]!r}?"
    return not_ours(path, "run or trace", "It has no zarr.json.", remedy)


def _read(path: Location, wanted: Kind, *, by_seal: bool = False) -> Group[Any]:
    content, group = _load(path, wanted)
    file, plain = path / "zarr.json", group["attributes"]
    if plain["kind"] != wanted:
        raise _other_kind(path, plain["kind"], wanted)
    if not seal_holds(content):
        raise IntegrityError(
            f"{file}: not the metadata that was written",
            why="The file was damaged, or edited by hand.",
            remedy=REPAIR,
        )
    labels = plain.pop("coordinates", "")
    attributes = parse_attributes(file, plain, wanted)
    try:
        nodes = (group.get("consolidated_metadata") or {"metadata": {}})["metadata"]
        if not isinstance(nodes, dict):
            raise TypeError("consolidated_metadata: not an object of objects")
        encodings = {} if wanted == "run" or by_seal else check_nodes(nodes, attributes)
        coordinates = frozenset(str.split(labels))
    except NONSENSE as error:
        raise damaged(file, error) from error
    return Group(path, attributes, plain, coordinates, nodes, encodings)


def _load(path: Location, wanted: str) -> tuple[bytes, dict[str, Any]]:
    """Read a group's ``zarr.json``, if its attributes are those of zarrtrace's format."""
    file = path / "zarr.json"
    try:
        if path.path is not None and (size := file.size()) > _MOST_BYTES:
            raise ValueError(f"no zarr.json has {size} bytes")
        content = file.read()
        group: dict[str, Any] = json.loads(content, parse_constant=_refuse_constant)
        if not isinstance(plain := group["attributes"], dict):
            raise TypeError("its attributes are not an object")
    except (FileNotFoundError, NotADirectoryError):
        raise _not_there(path, wanted) from None
    except (OSError, *NONSENSE) as error:
        raise damaged(file, error) from error
    if "zarrtrace" in plain:
        raise FormatVersionError(
            f"{path}: format version 1, which this zarrtrace does not read",
            why="It was written before the first release.",
            remedy="Extract it again.",
        )
    is_known = plain.get("kind") in list(_MODELS)
    if "seal" in plain and not is_known:
        raise damaged(file, f"attribute kind: {plain.get('kind')!r}")
    if not is_known or "format_version" not in plain:
        why = "Its zarr.json lacks the attributes 'kind' and 'format_version'."
        raise not_ours(path, wanted, why)
    version = plain["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: format version {version}, this zarrtrace reads version {FORMAT_VERSION}",
            why="It was written by a newer zarrtrace.",
            remedy="Install a newer zarrtrace.",
        )
    return content, group


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _other_kind(path: Location, kind: str, wanted: str) -> NotATraceError:
    """Return the error that says which kind of group is in a place, and what to give instead."""
    if kind == "index":
        what = f"{path}: is the index of a run, not a {wanted}"
        return NotATraceError(what, remedy=f"Give the run: {path.parent}.")
    return NotATraceError(f"{path}: is a {kind}, not a {wanted}", remedy=_OTHER_KIND[kind])


def not_ours(path: Location, wanted: str, why: str, remedy: str = _ELSEWHERE) -> NotATraceError:
    """Return the error that says that something else is in a place."""
    what = f"{path}: exists, but is not a zarrtrace {wanted}"
    return NotATraceError(what, why=why, remedy=remedy)


def damaged(file: Location, error: object) -> IntegrityError:
    """Return the error that says what is wrong with a file of metadata, or with labels."""
    return IntegrityError(
        f"{file}: damaged: {error}",
        why="It is not the metadata that zarrtrace wrote.",
        remedy=REPAIR,
    )


def parse_attributes(file: Location, plain: Mapping[str, Any], kind: Kind) -> Any:
    """Check a group's attributes, which are those that were written.

    Raises
    ------
    FormatVersionError
        If there is one that this version of the code does not know.
    IntegrityError
    """
    try:
        attributes = _MODELS[kind].model_validate(plain)
        # Names become folders: a file from elsewhere must not lead out of the run.
        if isinstance(attributes, RunAttributes):
            for name in attributes.scenarios:
                check_trace_name(name)
        elif isinstance(attributes, TraceAttributes):
            check_name(attributes.scenario)
    except ScenarioError as error:
        raise IntegrityError(
            f"{file}: {error.what}",
            why="zarrtrace writes no such name.",
            remedy="Do not use this file; ask where it comes from.",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":  # under a seal that holds: nothing is damaged
            raise FormatVersionError(
                f"{file}: attribute {where}, which this zarrtrace does not know",
                why="It was written by a newer zarrtrace.",
                remedy="Install a newer zarrtrace.",
            ) from None
        raise damaged(file, f"attribute {where}: {first['msg']}") from None
    return attributes


def check_nodes(
    nodes: Nodes,
    attributes: TraceAttributes | TableAttributes | IndexAttributes,
    *,
    is_whole: bool = True,
) -> dict[str, ArrayEncoding]:
    """Refuse metadata that no group of zarrtrace has, before anything is read by it.

    Returns how the arrays are encoded.

    Parameters
    ----------
    nodes
        Metadata of arrays by name.
    attributes
        Attributes of the group.
    is_whole
        Whether no file may be missing of arrays that are not written layer by layer; of coordinates
        none ever may.

    Raises
    ------
    ValueError, LookupError, TypeError, AttributeError, OverflowError
    """
    if not nodes:
        raise ValueError("it has no consolidated metadata")
    sizes = {"layer": len(attributes.layers)}
    if isinstance(attributes, TraceAttributes):
        sizes["attention_layer"] = len(attributes.layers_of("attention_layer"))
    encodings = {}
    for name, node in nodes.items():
        try:
            encodings[name] = check_array(name, node, sizes, is_whole=is_whole)
        except NONSENSE as error:
            raise ValueError(f"array {name!r}: {error}") from error
    if isinstance(attributes, IndexAttributes):
        return encodings
    needed = {"layer", "key" if isinstance(attributes, TraceAttributes) else "scenario"}
    if not needed <= nodes.keys():
        raise ValueError(f"it has no coordinates {sorted(needed)}")
    for name, encoding in encodings.items():
        if encoding.layout.dims == (name,) and encoding.layout.dtype != "int64":
            raise ValueError(f"index {name!r} is of type {encoding.layout.dtype}")
    if isinstance(attributes, TraceAttributes):
        _check_tokens(attributes, *encodings["key"].shape, is_marked="generated" in nodes)
    return encodings


def _check_tokens(attributes: TraceAttributes, tokens: int, *, is_marked: bool) -> None:
    """Refuse spans and continuations that the tokens do not have."""
    generation = attributes.generation
    if generation is not None and not is_marked:
        raise ValueError("it has no coordinate 'generated'")
    if generation is not None and generation.prompt_tokens > tokens:
        raise ValueError(f"generation.prompt_tokens is more than the {tokens} tokens there are")
    for name, span in attributes.spans.items():
        if max(span.tokens, default=0) >= tokens:
            raise ValueError(f"span {name!r} has positions beyond the prompt's {tokens} tokens")
