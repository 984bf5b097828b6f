"""A folder in the documented layout, every file of it looked at before anything is imported."""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zarrtrace.errors import ConfigError, NPZError
from zarrtrace.npz.archive import Header, keys_of, read_header
from zarrtrace.npz.files import check_inside, reading
from zarrtrace.npz.metadata import Metadata, ScenarioMetadata, find_metadata
from zarrtrace.npz.plausibility import ArrayEntry, check_distinct
from zarrtrace.suggestions import closest_path

# Counting further would take long where a metadata file claims millions.
_ENOUGH_MISSING = 10_000


@dataclass(frozen=True)
class Folder:
    """Metadata file and headers of all layer files.

    Attributes
    ----------
    headers
        By key; the same in all files.
    keys
        By layer: what its files hold, the same in all scenarios.
    fingerprint
        Hash of all files' checksums: tells whether an import goes on with the same files.
    """

    path: Path
    metadata: Metadata
    layers: tuple[int, ...]
    headers: Mapping[str, Header] = field(default_factory=dict)
    keys: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    fingerprint: str = ""

    def file(self, scenario: ScenarioMetadata, layer: int) -> Path:
        """Return where a layer's file is."""
        return self.path / scenario.scenario / f"layer_{layer}.npz"

    def dtype(self, key: str) -> Any:
        """Return an array's dtype, None if no file has it."""
        return self.headers[key].dtype if key in self.headers else None

    def size(self, key: str) -> int | None:
        """Return the number of heads or features, None if no file has any."""
        return self.headers[key].size if key in self.headers else None

    def without(self, key: str) -> tuple[int, ...]:
        """Return the layers that lack what others have."""
        if key not in self.headers:
            return ()
        return tuple(layer for layer in self.layers if key not in self.keys[layer])


def look_at(path: Path, metadata_name: str | None, layers: Sequence[int] | None) -> Folder:
    """Check a folder's names, headers and completeness, reading no values.

    Raises
    ------
    NPZError, ConfigError
    """
    if not path.is_dir():
        near = closest_path(path)
        raise NPZError(
            f"{path}: no such folder",
            remedy="Check the path." if near is None else f"Did you mean {str(near)!r}?",
        )
    if (path / "zarr.json").is_file():
        raise NPZError(
            f"{path}: is a run already, not a folder of NPZ files",
            why="It has a zarr.json.",
            remedy="Read it as it is; 'zarrtrace export' writes NPZ files.",
        )
    file, metadata = find_metadata(path, metadata_name)
    first, last = metadata.layer_range
    chosen = tuple(sorted(set(layers))) if layers is not None else tuple(range(first, last + 1))
    outside = [layer for layer in chosen if not first <= layer <= last]
    if outside or not chosen:
        raise ConfigError(
            f"{path}: layer {outside[0]} is not there" if outside else "no layer was asked for",
            remedy=f"{file.name} covers layers {first} to {last}.",
        )
    folder = Folder(path, metadata, chosen)
    _check_presence(folder)
    return _look_at_files(folder)


def _check_presence(folder: Folder) -> None:
    absent = (
        f"{scenario.scenario}/layer_{layer}.npz"
        for scenario in folder.metadata.scenarios
        for layer in folder.layers
        if not folder.file(scenario, layer).is_file()
    )
    missing = list(itertools.islice(absent, _ENOUGH_MISSING))
    if missing:
        count = f"{len(missing)}{' or more' if len(missing) == _ENOUGH_MISSING else ''}"
        raise NPZError(
            f"{folder.path}: {count} layer files are missing: {', '.join(missing[:8])}"
            + (", ..." if len(missing) > 8 else ""),
            why="Their writer was interrupted, or the copy of the folder is not whole.",
            remedy="Restore them, or say which layers to import (layers=...).",
        )


def _look_at_files(folder: Folder) -> Folder:
    """Check every file's headers against the metadata and against each other."""
    described = [scenario.model_dump() for scenario in folder.metadata.scenarios]
    digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=8)
    headers: dict[str, Header] = {}
    keys: dict[int, tuple[str, ...]] = {}
    contents: dict[Path, list[ArrayEntry]] = {}
    token_ids: dict[Path, tuple[int, ...]] = {}
    for scenario in folder.metadata.scenarios:
        ids = tuple(scenario.token_ids)
        for layer in folder.layers:
            file = folder.file(scenario, layer)
            check_inside(folder.path, file)
            with reading(file), zipfile.ZipFile(file) as archive:
                digest.update(repr([(i.CRC, i.file_size) for i in archive.infolist()]).encode())
                found = {
                    key: read_header(file, archive, key, scenario.seq_len)
                    for key in keys_of(file, archive)
                }
                infos = {key: archive.getinfo(f"{key}.npy") for key in found}
            contents[file] = [ArrayEntry(key, one.CRC, one.file_size) for key, one in infos.items()]
            _check_keys(folder, file, tuple(found), keys.setdefault(layer, tuple(found)))
            token_ids[file] = ids
            _check_alike(file, found, headers)
    for key in folder.metadata.keys:
        if key not in headers:
            raise _no_array(folder.path, key, "no file has any")
    check_distinct(contents, token_ids)
    return Folder(folder.path, folder.metadata, folder.layers, headers, keys, digest.hexdigest())


def _check_keys(
    folder: Folder, file: Path, found: tuple[str, ...], in_first_scenario: tuple[str, ...]
) -> None:
    """Refuse arrays that were not saved, and those that some scenarios lack in a layer."""
    unexpected = [key for key in found if key not in folder.metadata.keys]
    if unexpected:
        raise NPZError(
            f"{file}: holds {unexpected[0]!r}",
            why=f"By the metadata file, each layer holds: {', '.join(folder.metadata.keys)}.",
            remedy="Write this file again, or give the metadata file that belongs to it.",
        )
    for key in folder.metadata.keys:
        if (key in found) != (key in in_first_scenario):
            first = folder.path / folder.metadata.scenarios[0].scenario / file.name
            lacking = first if key in found else file
            raise _no_array(lacking, key, "other scenarios have it in this layer")


def _no_array(path: Path, key: str, others: str) -> NPZError:
    return NPZError(
        f"{path}: has no {key!r}",
        why=f"By the metadata file, it was saved; {others}.",
        remedy="Write it again, or give the metadata file that belongs to it.",
    )


def _check_alike(file: Path, found: Mapping[str, Header], headers: dict[str, Header]) -> None:
    """Compare what must be the same in all files: heads, features, dtypes."""
    for key, header in found.items():
        first = headers.setdefault(key, header)
        if header != first:
            what = {"features": "features", "attention": "heads"}[key]
            raise NPZError(
                f"{file}: {key!r} has {header.size} {what} as {header.dtype}, the files before it "
                f"{first.size} as {first.dtype}",
                why="Files of different models or runs are mixed.",
                remedy="Keep one run in a folder.",
            )
