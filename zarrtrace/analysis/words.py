"""Which words activate which features: from a run, or from the user's table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.blocks import SampleBlock, blocks
from zarrtrace.analysis.parallel import each_layer
from zarrtrace.analysis.pathways import at_least_one
from zarrtrace.analysis.repeats import Text
from zarrtrace.analysis.results import described
from zarrtrace.analysis.trace_arrays import taken
from zarrtrace.analysis.traces import Data, scenario_names
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import first_repeats

#: A feature–word table: own, the user's, or a CSV or Parquet file of it.
Table = xr.Dataset | pd.DataFrame | str | Path

# Pairs of a feature and a word that may be in memory at once: 40 bytes each, and few are there.
_MOST_PAIRS = 2**25

COLUMNS = ("layer", "feature", "word", "score")


def word_associations(
    data: Data,
    *,
    top: int = 10,
    min_count: int = 1,
    strip: bool = False,
    special: bool = False,
    text: Text = "all",
) -> xr.Dataset:
    """Tokens that activate each feature most, over all scenarios.

    The score of a word (a token's text) for a feature is the magnitude of its activation, averaged
    over all occurrences of the word in the run; an occurrence at which the feature is silent counts
    as 0. A feature fires where its activation is finite and non-zero: some SAEs (AbsTopK) have
    negative ones.

    Parameters
    ----------
    data
        A trace, a run or a table with ``features``.
    top
        Number of words to keep for each feature.
    min_count
        Keep only words at which the feature fires at least this many times.
    strip
        Whether to take ``" balance"`` and ``"balance"`` as one word; otherwise a word is the
        token's text as it is. A token of nothing but white space stays as it is.
    special
        Whether to count special tokens (BOS, chat markers), too. The first token of a prompt
        without BOS is an ordinary one, but many models treat it like BOS: its activations may be
        far above those of the same word elsewhere.
    text
        Count all tokens, those of prompts, or ``"generated"`` ones only. Among a scenario's repeats
        the prompt counts once.

    Returns
    -------
    xr.Dataset
        A table along ``row``, by layer and feature, best word first: coordinates ``layer``,
        ``feature``, ``word``; ``score`` and ``max_activation`` (the activation of largest
        magnitude, with its sign) float32 in the SAE's units,
        ``count`` (occurrences at which the feature fires) and ``occurrences`` of the word.
        Computed at the call from every activation in ``features``, some layers at a time, scenario
        by scenario. Memory holds the number of each token's word, and the pairs of a feature and a
        word that occur together.

    Raises
    ------
    ConfigError
        If a trace has no features, or `top` is below 1.

    Notes
    -----
    There is no null hypothesis and no p-value: a ranking always has a first word. The unit is an
    occurrence of the word, in whichever scenario. A word that occurs once has one activation as its
    mean; ``count`` says so, and `min_count` leaves it out.
    """
    at_least_one(top)
    parts_of = list(blocks(data, ["token", "features"]))
    kept = _kept(data, parts_of, special=special, text=text)
    vocabulary, word_ids = _numbered(parts_of, kept, strip=strip)
    parts = [
        _ranked(layer, pairs, occurrences, top, min_count)
        for layer, pairs, occurrences in _by_layer(parts_of, word_ids, len(vocabulary))
    ]
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    words = np.array(vocabulary, dtype=object)
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
        "mean magnitude of activation over all occurrences of the word; a description of these "
        "prompts, without a test",
        top=top,
        min_count=min_count,
        strip=strip,
        special=special,
        text=text,
    )


def _kept(
    data: Data, found: Sequence[SampleBlock], *, special: bool, text: Text
) -> Iterator[np.ndarray]:
    """Yield which samples of each block count.

    Raises
    ------
    ConfigError
        If none does.
    """
    first = np.array(first_repeats(scenario_names(data)), bool)
    some = False
    for block in found:
        kept = block.counted(first, text)
        if not special:
            kept = kept & ~block.special()
        some |= bool(kept.any())
        yield kept
    if not some and text == "generated":
        raise ConfigError(
            "no token was generated",
            why="The run holds prompts only, or none of the generated positions are stored.",
            remedy="Extract with --generate N, or take text='all'.",
        )


def _word(text: str, *, strip: bool) -> str:
    return (text.strip() or text) if strip else text


def _numbered(
    found: Sequence[SampleBlock], kept: Iterable[np.ndarray], *, strip: bool
) -> tuple[list[str], list[np.ndarray]]:
    """Return all words, and for each block the number of each sample's ``(sample,)`` int32.

    −1 for a token that does not count.
    """
    vocabulary: dict[str, int] = {}
    numbers = []
    for block, counts in zip(found, kept, strict=True):
        texts = [_word(str(text), strip=strip) for text in np.asarray(block.arrays["token"])]
        numbers.append(
            np.array(
                [
                    vocabulary.setdefault(text, len(vocabulary)) if count else -1
                    for text, count in zip(texts, counts, strict=True)
                ],
                np.int32,
            )
        )
    return list(vocabulary), numbers


def all_layers(runs: Iterable[xr.Dataset]) -> list[int]:
    """Return the layers that any of the traces has."""
    return sorted({int(layer) for ds in runs for layer in np.asarray(ds["layer"])})


def missing_rows(layer: np.ndarray) -> np.ndarray:
    """Tell which rows of features ``(row, feature)`` are not stored: NaN throughout ``(row,)``."""
    missing: np.ndarray = np.isnan(layer[:, 0])
    if missing.any():  # a NaN by itself is a value that was not finite
        missing[missing] = np.isnan(layer[missing]).all(1)
    return missing


class _Pairs(NamedTuple):
    """Pairs of a feature and a word that occur together, ascending, one entry each.

    Attributes
    ----------
    key
        ``feature × number of words + word``.
    total, largest, smallest
        Sum of magnitudes, and the extremes of activations.
    count
        Occurrences at which the feature fires.
    """

    key: np.ndarray
    total: np.ndarray
    largest: np.ndarray
    smallest: np.ndarray
    count: np.ndarray  # type: ignore[assignment]  # tuple.count is not used

    @classmethod
    def together(cls, parts: Sequence[_Pairs]) -> _Pairs:
        """Add up the entries of each pair, in the order of the parts."""
        key = np.concatenate([part.key for part in parts])
        order = _stable_order(key)
        key = key[order]
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        if not len(starts):
            return parts[0]

        def reduced(name: str, by: np.ufunc) -> np.ndarray:
            values = np.concatenate([getattr(part, name) for part in parts])[order]
            return np.asarray(by.reduceat(values, starts))

        return cls(
            key[starts],
            reduced("total", np.add),
            reduced("largest", np.maximum),
            reduced("smallest", np.minimum),
            reduced("count", np.add),
        )


def _by_layer(
    found: Sequence[SampleBlock],
    words: Sequence[np.ndarray],
    n_words: int,
    most: int = _MOST_PAIRS,
) -> Iterator[tuple[int, _Pairs, np.ndarray]]:
    """Yield each layer with its pairs and how often each word occurs; several are read at once."""
    layers = sorted({layer for block in found for layer in block.layers})
    width = max(block.arrays["features"].sizes["feature"] for block in found)
    step = max(1, most // (width * max(1, n_words)))
    for start in range(0, len(layers), step):
        chosen = [[n for n in block.layers if n in layers[start : start + step]] for block in found]
        sums = {layer: _Sum(n_words) for layer in layers[start : start + step]}
        jobs = (
            (_at_layers(block, wanted), partial(_pairs_of_layer, words=numbers, n_words=n_words))
            for block, wanted, numbers in zip(found, chosen, words, strict=True)
        )
        for wanted, of_layers in zip(chosen, each_layer(jobs), strict=True):
            for layer, (pairs, occurrences) in zip(wanted, of_layers, strict=True):
                sums[layer].add(pairs, occurrences)
        for layer in list(sums):
            total = sums.pop(layer)
            yield layer, total.pairs(), total.occurrences


class _Sum:
    """Pairs of one layer, added up as they come: as large as their number, not the run's."""

    def __init__(self, n_words: int) -> None:
        self.occurrences = np.zeros(n_words, np.int64)
        none, whole = np.empty(0), np.empty(0, np.int64)
        self._sum = _Pairs(whole, none, none, none, whole)
        self._waiting: list[_Pairs] = []

    def add(self, pairs: _Pairs, occurrences: np.ndarray) -> None:
        """Add the pairs of some samples."""
        self.occurrences += occurrences
        self._waiting.append(pairs)
        # Each pair is sorted again a few times only.
        if sum(len(one.key) for one in self._waiting) > max(2**18, len(self._sum.key)):
            self.pairs()

    def pairs(self) -> _Pairs:
        """Return what was added up so far."""
        self._sum = _Pairs.together([self._sum, *self._waiting])
        self._waiting = []
        return self._sum


def _at_layers(block: SampleBlock, layers: Sequence[int]) -> xr.DataArray:
    return taken(block.arrays["features"].assign_coords(layer=block.layers), layer=layers)


def _pairs_of_layer(
    layer: np.ndarray, _at: int, *, words: np.ndarray, n_words: int
) -> tuple[_Pairs, np.ndarray]:
    """Return the pairs of one layer of a block ``(sample, feature)``, and how often words occur."""
    stored = (words >= 0) & ~missing_rows(layer)
    occurrences = np.bincount(words[stored], minlength=n_words)
    width = layer.shape[1]
    at = np.flatnonzero(layer)
    value = layer.reshape(-1)[at].astype(np.float64)
    sample, feature = np.divmod(at, width)
    fires = stored[sample] & np.isfinite(value)
    value = value[fires]
    key = feature[fires] * n_words + words[sample[fires]]
    ones = np.ones(len(key), np.int64)
    return _Pairs.together([_Pairs(key, np.abs(value), value, value, ones)]), occurrences


def _ranked(
    layer: int, pairs: _Pairs, occurrences: np.ndarray, top: int, min_count: int
) -> dict[str, np.ndarray]:
    """Return the rows of one layer, best word first."""
    feature, word = np.divmod(pairs.key, max(1, len(occurrences)))
    score = pairs.total / occurrences[word]
    peak = np.where(-pairs.smallest > pairs.largest, pairs.smallest, pairs.largest)
    best = _best(feature, score, word, pairs.count >= min_count, top)
    return {
        "layer": np.full(len(best), layer, np.int64),
        "feature": feature[best],
        "word": word[best],
        "score": score[best].astype(np.float32),
        "max_activation": peak[best].astype(np.float32),
        "count": pairs.count[best],
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
        Result of :func:`word_associations`, a DataFrame, or the path of a CSV or Parquet file,
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
