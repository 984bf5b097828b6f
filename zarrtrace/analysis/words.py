"""Which words activate which features: from a run, or from the user's table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.blocks import Block, blocks
from zarrtrace.analysis.parallel import each_layer, load
from zarrtrace.analysis.selecting import Data, described, taken
from zarrtrace.analysis.tables import is_table
from zarrtrace.errors import ConfigError
from zarrtrace.format.layout import TOP_FEATURES
from zarrtrace.records import Nonzeros, strongest

#: A feature–word table: own, the user's, or a CSV or Parquet file of it.
Table = xr.Dataset | pd.DataFrame | str | Path

# Activations in memory at once, of one layer at least.
_AT_ONCE = 2**24

# What a trace stores of the strongest features of each token.
_INDEX = ("top_feature", "top_activation")

COLUMNS = ("layer", "feature", "word", "score")


def word_associations(
    data: Data, *, top: int = 10, min_count: int = 1, strip: bool = False
) -> xr.Dataset:
    """Tokens that activate each feature most, over all scenarios.

    The score of a word (a token's text) for a feature is the magnitude of its activation, averaged
    over all occurrences of the word in the run; an occurrence at which the feature is silent counts
    as 0. A feature fires where its activation is not 0: some SAEs (AbsTopK) have negative ones.

    Parameters
    ----------
    data
        A trace or a run with ``top_feature`` and ``top_activation``, or a table with ``features``.
    top
        How many words to keep for each feature.
    min_count
        Keep only words at which the feature fires at least so many times.
    strip
        Whether to take ``" balance"`` and ``"balance"`` as one word; otherwise a word is the
        token's text as it is. A token of nothing but white space stays as it is.

    Returns
    -------
    xr.Dataset
        A table along ``row``, by layer and feature, best word first: coordinates ``layer``,
        ``feature``, ``word``; ``score`` and ``max_activation`` (the activation of largest
        magnitude, with its sign) float32 in the SAE's units,
        ``count`` (occurrences at which the feature fires) and ``occurrences`` of the word.
        Computed at the call, some layers at a time. It takes each token's 32 strongest features
        only, from the index that a trace stores, or from a table's features: an activation that is
        not among its token's 32 strongest counts as 0, and a feature that never is has no row.

    Raises
    ------
    ConfigError
        If a trace has no features.
    """
    if top < 1:
        raise ConfigError(f"top={top} keeps nothing", remedy="Give a number of at least 1.")
    vocabulary: dict[str, int] = {}
    word_ids = []
    parts_of = list(blocks(data, _needed(data), _INDEX))
    for block in parts_of:
        texts = [_word(str(text), strip=strip) for text in np.asarray(block.arrays["token"])]
        word_ids.append(np.array([vocabulary.setdefault(t, len(vocabulary)) for t in texts]))
    parts = [
        _associations_of_layer(layer, seen, len(vocabulary), top, min_count)
        for layer, seen in _by_layer(parts_of, word_ids)
    ]
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    words = np.array(list(vocabulary), dtype=object)
    out = xr.Dataset(
        {
            name: ("row", table[name])
            for name in ("score", "max_activation", "count", "occurrences")
        },
        coords={
            "row": np.arange(len(table["score"])),
            "layer": ("row", table["layer"]),
            "feature": ("row", table["feature"]),
            "word": ("row", words[table["word"]]),
        },
    )
    return described(
        out,
        data,
        "word_associations",
        "mean magnitude of activation over all occurrences of the word; activations below a "
        "token's 32 strongest count as 0",
        top=top,
        min_count=min_count,
        strip=strip,
    )


def _word(text: str, *, strip: bool) -> str:
    return (text.strip() or text) if strip else text


def all_layers(runs: Iterable[xr.Dataset]) -> list[int]:
    """Return the layers that any of the traces has."""
    return sorted({int(layer) for ds in runs for layer in np.asarray(ds["layer"])})


class _Seen(NamedTuple):
    """A layer of some samples: their words and the strongest features of each.

    Attributes
    ----------
    words
        ``(sample,)`` numbers of the words.
    feature, activation
        ``(sample, rank)``.
    """

    words: np.ndarray
    feature: np.ndarray
    activation: np.ndarray


def _needed(data: Data) -> list[str]:
    """Return the arrays that say which features are strongest: a trace has an index of them."""
    return ["token", "features"] if is_table(data) else ["token", *_INDEX]


def _by_layer(
    found: Sequence[Block], words: Sequence[np.ndarray], most: int = _AT_ONCE
) -> Iterator[tuple[int, list[_Seen]]]:
    """Yield each layer with what the blocks that have it say; several layers are read at once."""
    layers = sorted({layer for block in found for layer in block.layers})
    step = max(1, most // sum(int(block.starts[-1]) * TOP_FEATURES for block in found))
    for start in range(0, len(layers), step):
        here = layers[start : start + step]
        seen: dict[int, list[_Seen]] = {layer: [] for layer in here}
        chosen = [[n for n in block.layers if n in seen] for block in found]
        strongest = _strongest(found, chosen)
        for numbers, wanted, both in zip(words, chosen, strongest, strict=True):
            for layer, (feature, activation) in zip(wanted, both, strict=True):
                seen[layer].append(_Seen(numbers, feature, activation))
        yield from seen.items()


def _strongest(
    found: Sequence[Block], layers: Sequence[Sequence[int]]
) -> Iterator[Iterable[tuple[np.ndarray, np.ndarray]]]:
    """Yield each block's strongest features and their activations ``(sample, rank)``, by layer."""
    arrays = [
        [
            _at_layers(block, name, wanted)
            for name in (_INDEX if _is_indexed(block) else ["features"])
        ]
        for block, wanted in zip(found, layers, strict=True)
    ]
    if all(map(_is_indexed, found)):
        loaded = load(array for both in arrays for array in both)
        for feature, activation in zip(loaded, loaded, strict=False):
            yield zip(feature, activation, strict=True)
        return
    yield from each_layer((array, _strongest_of_layer) for (array,) in arrays)


def _is_indexed(block: Block) -> bool:
    return all(name in block.arrays for name in _INDEX)


def _at_layers(block: Block, name: str, layers: Sequence[int]) -> xr.DataArray:
    return taken(block.arrays[name].assign_coords(layer=block.layers), layer=layers)


def _strongest_of_layer(layer: np.ndarray, _at: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what traces store of their strongest features; NaN for samples that are missing."""
    missing = np.isnan(layer[:, 0])
    layer = np.where(missing[:, None], 0, layer) if missing.any() else layer
    at = np.flatnonzero(layer)
    whole = Nonzeros(layer.shape, layer.shape[1], (at,), (layer.reshape(-1)[at],))
    feature, activation = strongest(whole)
    activation[missing] = np.nan
    return feature, activation


def _associations_of_layer(
    layer: int, seen: Sequence[_Seen], n_words: int, top: int, min_count: int
) -> dict[str, np.ndarray]:
    occurrences = np.zeros(n_words, np.int64)
    keys, values = [], []
    for words, feature, activation in seen:
        # No SAE on this layer, or not stored: nothing was seen here.
        occurrences += np.bincount(words[~np.isnan(activation).all(1)], minlength=n_words)
        active = np.abs(activation) > 0  # which NaN is not
        pair = feature.astype(np.int64) * n_words + words[:, None]
        keys.append(pair[active])
        values.append(activation[active].astype(np.float64))
    key = np.concatenate([*keys, np.empty(0, np.int64)])
    value = np.concatenate([*values, np.empty(0)])
    order = _stable_order(key)
    key, value = key[order], value[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    feature, word = np.divmod(key[starts], n_words)
    score = np.add.reduceat(np.abs(value), starts) / occurrences[word]
    largest, smallest = np.maximum.reduceat(value, starts), np.minimum.reduceat(value, starts)
    peak = np.where(-smallest > largest, smallest, largest)
    count = np.diff(np.append(starts, len(key)))
    best = _best(feature, score, word, count >= min_count, top)
    return {
        "layer": np.full(len(best), layer, np.int64),
        "feature": feature[best],
        "word": word[best],
        "score": score[best].astype(np.float32),
        "max_activation": peak[best].astype(np.float32),
        "count": count[best],
        "occurrences": occurrences[word[best]],
    }


def _stable_order(key: np.ndarray) -> np.ndarray:
    """Return what ``argsort(kind="stable")`` does, several times faster.

    Numbers that end in their place are sorted, which NumPy does with wide registers.
    """
    bits = len(key).bit_length()
    if int(key.max(initial=0)).bit_length() + bits > 63:
        return np.argsort(key, kind="stable")
    return np.asarray(np.sort(key << bits | np.arange(len(key))) & ((1 << bits) - 1))


def _best(
    feature: np.ndarray, score: np.ndarray, word: np.ndarray, kept: np.ndarray, top: int
) -> np.ndarray:
    """Return where the `top` best words of each feature are among those kept, best first."""
    order = np.lexsort((word, -score, feature))
    order = order[kept[order]]
    first = np.searchsorted(feature[order], feature[order], side="left")
    return np.asarray(order[np.arange(len(order)) - first < top])


# --- the user's table --------------------------------------------------------------------------


def read_table(table: Table) -> pd.DataFrame:
    """Read a feature–word table.

    Parameters
    ----------
    table
        What :func:`word_associations` returned, a DataFrame, or the path of a CSV or Parquet file,
        with columns ``layer``, ``feature``, ``word`` and ``score`` (others are left out).

    Returns
    -------
    pd.DataFrame
        These four columns; layer and feature int64, word str, score float64.

    Raises
    ------
    ConfigError
        If it cannot be read, a column is missing, or a value is none of its column's.
    """
    name = str(table) if isinstance(table, str | Path) else "the feature–word table"
    if isinstance(table, str | Path):
        frame = _read_file(Path(table))
    elif isinstance(table, xr.Dataset):
        frame = table.to_dataframe().reset_index() if table.sizes else pd.DataFrame()
    else:
        frame = table
    absent = [column for column in COLUMNS if column not in frame.columns]
    if absent:
        raise ConfigError(
            f"{name} has no column {absent[0]!r}",
            why=f"It has: {', '.join(map(str, frame.columns)) or 'none'}.",
            remedy="Name its columns layer, feature, word and score.",
        )
    try:
        return pd.DataFrame(
            {
                "layer": _whole_numbers(frame["layer"]),
                "feature": _whole_numbers(frame["feature"]),
                "word": frame["word"].astype(str),
                "score": frame["score"].astype(np.float64),
            }
        ).reset_index(drop=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}: a value does not fit its column ({error})",
            why="layer and feature are whole numbers, score is a number.",
            remedy="Correct or leave out those rows.",
        ) from None


def _whole_numbers(column: pd.Series[int]) -> pd.Series[int]:
    numbers = column.astype(np.float64)
    if not (numbers == np.floor(numbers)).all():
        raise ValueError(f"{column.name} has a value that is not a whole number")
    return numbers.astype(np.int64)


def _read_file(path: Path) -> pd.DataFrame:
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return pd.read_parquet(path)
        if path.suffix.lower() in (".csv", ".tsv"):
            separator = "\t" if path.suffix.lower() == ".tsv" else ","
            # Words such as "null" and "NA" are words.
            return pd.read_csv(path, sep=separator, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read as a table ({error})",
            remedy="Give a CSV or Parquet file with columns layer, feature, word and score.",
        ) from error
    raise ConfigError(
        f"{path}: unknown kind of table {path.suffix or '(no ending)'!r}",
        remedy="Give a .csv, .tsv or .parquet file.",
    )
