"""Labels of features: read from CSV, Parquet or Neuronpedia's exports, kept beside the traces."""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from zarrtrace.errors import ConfigError
from zarrtrace.format.attributes import sae_coordinate
from zarrtrace.format.layout import LABELLED
from zarrtrace.index.neuronpedia import source_of
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import (
    LABEL_COLUMNS,
    IndexableTrace,
    locked,
    open_array,
    read_indexable,
    read_label_file,
    read_run_or_table,
    read_table,
    read_trace,
    write_label_file,
)

#: A table of labels, or the path of a file of them.
Labels = pd.DataFrame | str | Path

_OF_TABLE = ("layer", "feature", "label")
# An explanation as Neuronpedia exports it; `layer` is the SAE's name there, as "8-res-jb".
_OF_NEURONPEDIA = ("modelId", "layer", "index", "description")
_FEATURE = list(LABEL_COLUMNS[:3])


class LabelUpdate(NamedTuple):
    """The outcome of :func:`write_labels`.

    Attributes
    ----------
    added, stored
        Numbers of features that got a label, and that have one now.
    other_saes
        Rows left out because they are of SAEs, arrays or layers that the run lacks.
    out_of_range
        Rows left out because the SAE has no feature of that number.
    empty
        Rows left out because they have no text.
    repeated
        Rows left out because an earlier one labels the same feature.
    """

    added: int
    stored: int
    other_saes: int = 0
    out_of_range: int = 0
    empty: int = 0
    repeated: int = 0

    def left_out(self) -> str:
        """Say which rows were left out, and why; empty if none was."""
        reasons = {
            "of other SAEs or layers": self.other_saes,
            "of features that the SAE has not": self.out_of_range,
            "without text": self.empty,
            "of a feature that an earlier row labels": self.repeated,
        }
        return ", ".join(f"{count:,} {why}" for why, count in reasons.items() if count)


def write_labels(
    run: Address, labels: Labels | Sequence[Labels], *, replace: bool = False
) -> LabelUpdate:
    """Store labels of features with a run or a table.

    Features that have a label keep it unless one of `labels` is given for them.

    Parameters
    ----------
    run
        Folder of the run or the table, or its address.
    labels
        A DataFrame or a file, or several. A ``.csv``, ``.tsv``, ``.parquet`` or ``.jsonl`` file has
        columns ``layer``, ``feature``, ``label``, and may have ``array`` (``features``, or
        ``features_<name>`` for further SAEs on a layer); others are left out. Explanations as
        Neuronpedia exports them (``.jsonl``, ``.json``) have ``modelId``, ``layer``, ``index`` and
        ``description``, and are matched with the run's SAEs by their name there. Files may be
        gzipped (``.gz``).
    replace
        Whether to remove all labels that are there.

    Returns
    -------
    LabelUpdate

    Raises
    ------
    ConfigError
        If a file cannot be read, or no row is of a feature of the run; nothing is written.
    LockedError
        If another process is writing the run.
    NotATraceError, FormatVersionError, IntegrityError
        If the run, or its labels, cannot be read.
    """
    run = locate(run).resolved()
    read_run_or_table(run)  # says what is wrong if it is neither
    given = [labels] if isinstance(labels, pd.DataFrame | str | Path) else list(labels)
    with locked(run):
        saes = _saes_of(run)
        rows = pd.concat([_placed(*_read(one), saes) for one in given], ignore_index=True)
        new, counts = _fitting(rows, saes)
        if new.empty:
            raise _no_row(run, saes, LabelUpdate(0, 0, **counts))
        both = new if replace else pd.concat([new, read_label_file(run)], ignore_index=True)
        stored = both.drop_duplicates(_FEATURE)
        write_label_file(run, stored)
    return LabelUpdate(len(new), len(stored), **counts)


def read_labels(
    run: Address,
    *,
    layers: Collection[int] | None = None,
    array: str | None = None,
    text: str = "",
) -> pd.DataFrame:
    """Read the labels of a run, a table, or the run that a trace is in.

    Parameters
    ----------
    run
        Its folder, or its address.
    layers, array
        Only of these layers, and of this array of features; all if None.
    text
        Only labels that hold all of its words, case aside; parts of words count.

    Returns
    -------
    pd.DataFrame
        With columns ``array``, ``layer``, ``feature``, ``label``, sorted by the first three;
        without rows if there are none.

    Raises
    ------
    IntegrityError
        If they are damaged.
    """
    frame = read_label_file(home_of(run, LABELLED), array=array, layers=layers)
    lower = frame["label"].str.lower()
    for word in text.lower().split():
        frame = frame[lower.loc[frame.index].str.contains(word, regex=False)]
    return frame.reset_index(drop=True)


def label_of(run: Address, layer: int, feature: int, array: str = "features") -> str:
    """Return the label of a feature; empty if it has none."""
    home = home_of(run, LABELLED)
    if not (home / LABELLED).is_file():
        return ""
    frame = read_label_file(home, array=array, layers=[layer])
    found = frame.loc[frame["feature"] == feature, "label"].tolist()
    return str(found[0]) if found else ""


def home_of(path: Address, name: str) -> Location:
    """Return the run that has a file or folder of this name: `path` itself, or the trace's run."""
    path = locate(path).resolved()
    return path if (path / name).exists() or not (path.parent / name).exists() else path.parent


# --- files -------------------------------------------------------------------------------------


def _read(given: Labels) -> tuple[pd.DataFrame, str]:
    """Return the rows of a file, and its name for messages."""
    if isinstance(given, pd.DataFrame):
        return given, "the table of labels"
    path = Path(given)
    ending = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    try:
        match ending.lower():
            case ".parquet" | ".pq":
                return pd.read_parquet(path), str(path)
            case ".csv" | ".tsv" as kind:
                separator = "\t" if kind == ".tsv" else ","
                # "null" is a label; and numbers are checked below, where the row can be named.
                frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
                return frame, str(path)
            case ".jsonl" | ".json" as kind:
                return pd.DataFrame(_objects(path, is_lines=kind == ".jsonl")), str(path)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error})",
            why="It is not there, cut short, or of another kind than its ending says.",
            remedy="Give a CSV or Parquet file with columns layer, feature and label, or "
            "explanations exported by Neuronpedia.",
        ) from error
    raise ConfigError(
        f"{path}: unknown kind of file {path.suffix or '(no ending)'!r}",
        remedy="Give a .csv, .tsv, .parquet, .jsonl or .json file, gzipped (.gz) or not.",
    )


def _objects(path: Path, *, is_lines: bool) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON: those columns that are read."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        found: Iterable[Any] = (
            (json.loads(line) for line in file if line.strip()) if is_lines else json.load(file)
        )
        for number, one in enumerate(found):
            if not isinstance(one, dict):
                raise ValueError(f"entry {number} is no object")  # noqa: TRY004 -- said of the file
            # Others hold vectors of hundreds of numbers.
            yield {name: one.get(name) for name in (*_OF_NEURONPEDIA, *_OF_TABLE, "array")}


# --- rows --------------------------------------------------------------------------------------


class _Sae(NamedTuple):
    """Size of an SAE, and its name on Neuronpedia, if known."""

    size: int
    source: str | None


_Saes = Mapping[tuple[str, int], _Sae]


def _saes_of(run: Location) -> _Saes:
    """Return every SAE of a run or a table, by array and layer."""
    found: dict[tuple[str, int], _Sae] = {}
    for part in read_indexable(run).parts:
        here = {(array, layer) for array, layers in part.layers.items() for layer in layers}
        if here <= found.keys():
            continue
        is_trace = isinstance(part, IndexableTrace)
        group = read_trace(part.path) if is_trace else read_table(part.path)
        for array in part.layers:
            ids = sae_coordinate("id", array)
            known, by_layer = group.attributes.saes.get(array), dict[int, str]()
            if ids in group.nodes:
                by_layer = dict(
                    zip(group.attributes.layers, open_array(group, ids).load(), strict=True)
                )
            release = None if known is None else known.release
            for layer in part.layers[array]:
                source = source_of(release, str(by_layer.get(layer, "")))
                found.setdefault((array, layer), _Sae(part.features[array], source))
    return found


def _placed(frame: pd.DataFrame, name: str, saes: _Saes) -> pd.DataFrame:
    """Return rows as the run names features; the array is empty where it has no such SAE."""
    if {*_OF_NEURONPEDIA} <= {*frame} and frame["modelId"].notna().any():
        places = {one.source: place for place, one in saes.items() if one.source}
        sources = frame["modelId"].astype(str) + "/" + frame["layer"].astype(str)
        found = [places.get(source, ("", -1)) for source in sources]
        arrays, layers = [array for array, _ in found], [layer for _, layer in found]
        features, labels = frame["index"], frame["description"]
    else:
        if absent := [column for column in _OF_TABLE if column not in frame]:
            raise ConfigError(
                f"{name} has no column {absent[0]!r}",
                why=f"It has: {', '.join(map(str, frame)) or 'none'}.",
                remedy="Name its columns layer, feature and label; array, too, for further SAEs.",
            )
        given = frame.get("array", pd.Series("", frame.index)).fillna("")
        arrays = [str(array) or "features" for array in given]
        layers = _whole_numbers(frame["layer"], name)
        features, labels = frame["feature"], frame["label"]
    texts = [" ".join(str(text).split()) for text in labels.fillna("")]
    columns = (arrays, layers, _whole_numbers(features, name), texts)
    return pd.DataFrame(dict(zip(LABEL_COLUMNS, columns, strict=True)))


def _whole_numbers(column: pd.Series[Any], name: str) -> list[int]:
    """Return numbers, also those written as text."""
    numbers = pd.to_numeric(column, errors="coerce").astype("float64")
    wrong = ~((numbers % 1 == 0) & (numbers.abs() < 2**53))
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise ConfigError(
            f"{name}: row {row} has {column.iloc[row]!r} where a whole number should be",
            why="layer and feature are whole numbers.",
            remedy="Correct or leave out that row.",
        )
    return [int(number) for number in numbers]


def _fitting(rows: pd.DataFrame, saes: _Saes) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the rows that label a feature of the run, the first of each, and count the others."""
    places = list(zip(rows["array"], rows["layer"], strict=True))
    sizes = pd.Series([saes[at].size if at in saes else 0 for at in places], rows.index, int)
    kept, counts = rows, {}
    for reason, is_wrong in (
        ("other_saes", sizes == 0),
        ("out_of_range", (rows["feature"] < 0) | (rows["feature"] >= sizes)),
        ("empty", rows["label"] == ""),
    ):
        counts[reason] = int(is_wrong[kept.index].sum())
        kept = kept[~is_wrong[kept.index]]
    new = kept.drop_duplicates(_FEATURE)
    return new, {**counts, "repeated": len(kept) - len(new)}


def _no_row(run: Location, saes: _Saes, update: LabelUpdate) -> ConfigError:
    if not saes:
        return ConfigError(
            f"{run}: has no features to label",
            why="It was extracted with --no-features, or no scenario is complete yet.",
            remedy="Extract it with features first.",
        )
    arrays = sorted({array for array, _ in saes})
    layers = sorted({layer for _, layer in saes})
    sources = sorted(one.source for one in saes.values() if one.source)
    known = f"on Neuronpedia {sources[0]} and so on" if sources else "not known on Neuronpedia"
    return ConfigError(
        f"{run}: no row labels a feature of it, nothing was stored",
        why=f"Rows: {update.left_out() or 'none'}. Its SAEs are {', '.join(arrays)} of layers "
        f"{layers[0]} to {layers[-1]}, {known}.",
        remedy="Give explanations of these SAEs, or a CSV file with layer, feature and label.",
    )
