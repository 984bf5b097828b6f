"""Values and files of an NPZ folder that no capture of a causal model can have produced."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zarrtrace.errors import NPZError
from zarrtrace.npz.archive import read_array
from zarrtrace.npz.files import reading
from zarrtrace.store import attention_problem

#: Facts that an NPZ folder does not hold, so that an import cannot tell.
NOT_TOLD = (
    "Not told by NPZ files, so not checked: whether a file belongs to the layer that its name "
    "says, and, of scenarios with equally many tokens, to the scenario of its folder."
)


def check_attention(file: Path, attention: np.ndarray, queries: np.ndarray) -> None:
    """Refuse what is no attention probability of a causal model.

    Parameters
    ----------
    file
        Where it is from.
    attention
        ``(head, query, key)``, finite.
    queries
        Positions of its rows.

    Raises
    ------
    NPZError
        If a weight is negative or above 1, a row's sum is above 1 by more than rounding, a token
        attends to one behind it, or a row is 0 in every head.
    """
    if problem := attention_problem(attention, queries, causal=True):
        raise NPZError(
            f"{file}: 'attention' {problem}",
            why="It holds scores before the softmax, is transposed, is of an encoder, or was never "
            "filled in. The rows (head, query, key) of a causal model are probabilities.",
            remedy="Write the file again, with the attention weights behind the softmax.",
        )


class ArrayEntry(NamedTuple):
    """One array of a layer file, by what its archive says of it.

    Attributes
    ----------
    key, crc, size
        Name, checksum and bytes of the array.
    """

    key: str
    crc: int
    size: int


def check_distinct(
    files: Mapping[Path, Iterable[ArrayEntry]], token_ids: Mapping[Path, tuple[int, ...]]
) -> None:
    """Refuse layer files that hold the same numbers as another of other tokens or another layer.

    Equal numbers are plausible only where nothing is said: one token attends to itself alone, and
    features may all be silent; and in one layer of two scenarios with the same tokens.

    Parameters
    ----------
    files
        The arrays of each file.
    token_ids
        Tokens of the scenario that each is from.

    Raises
    ------
    NPZError
    """
    seen: dict[ArrayEntry, list[Path]] = {}
    for file, contents in files.items():
        for content in contents:
            if content.key == "attention" and len(token_ids[file]) == 1:
                continue
            seen.setdefault(content, []).append(file)
    for content, equal in seen.items():
        for one, other in itertools.pairwise(equal):
            if one.name == other.name and token_ids[one] == token_ids[other]:
                continue
            if _hold_the_same(content.key, one, other):
                raise NPZError(
                    f"{other}: holds the same {content.key!r} as {one}",
                    why="A file was copied to another layer or scenario: no two of them have equal "
                    "numbers.",
                    remedy="Restore the file, or write the folder again.",
                )


def _hold_the_same(key: str, one: Path, other: Path) -> bool:
    """Whether two arrays are equal and not all 0; their checksums are."""
    arrays = []
    for file in (one, other):
        with reading(file), zipfile.ZipFile(file) as archive:
            arrays.append(read_array(archive, key))
    first, second = arrays
    return first.tobytes() == second.tobytes() and bool(np.nan_to_num(first).any())
