"""Choose the backend of an address: obstore where it has one, fsspec to read whatever else."""

from __future__ import annotations

from collections.abc import Mapping

from zarrtrace.storage.backend import Backend
from zarrtrace.storage.fsspec_files import FsspecFiles
from zarrtrace.storage.object_store import SCHEMES, ObjectStore


def connect(base: str, options: Mapping[str, str]) -> Backend:
    """Return the store at an address.

    Raises
    ------
    ConfigError
        If no installed package knows this kind of address, or one of the options.
    """
    if base.partition("://")[0] in SCHEMES:
        return ObjectStore(base, options)
    return FsspecFiles(base, options)
