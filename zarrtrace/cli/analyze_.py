"""``zarrtrace analyze``: one subcommand an analysis."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zarrtrace.cli.shared import (
    PATH,
    computing,
    quiet_option,
    run_argument,
    say,
    scheduler_option,
    show_progress,
    workers_option,
)
from zarrtrace.text import terminal_text

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from zarrtrace.storage import Location

_ROWS_SHOWN = 60
# Bytes of attention in a layer of 1,024 tokens and 32 heads; more is not read at once.
_LARGE_LAYER = 2**27
_ENDINGS = (".csv", ".parquet", ".nc", ".json")


class Place(click.ParamType[str | int]):
    """A span's name or a token position."""

    name = "PLACE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | int:
        """Parse a number as one."""
        del param, ctx
        text = str(value)
        return int(text) if text.removeprefix("-").isdecimal() else text


def _option(*names: str, **settings: Any) -> Callable[..., Any]:
    return click.option(*names, **settings)


_SOURCES = _option("--source", type=Place(), multiple=True, help="Span or position; repeatable.")
_TARGET = _option("--target", type=Place(), default="decision", show_default=True)
_AT = _option("--at", type=Place(), multiple=True, help="Span or position; repeatable.")
_SPANS = _option("--span", "spans", multiple=True, help="Only these spans; repeatable.")
_HEADS = _option("--heads", type=click.Choice(["mean", "each"]), default="mean", show_default=True)
_TOP = _option("--top", type=click.IntRange(1), default=10, show_default=True)
_SEED = _option("--seed", type=int, default=0, show_default=True)
_PERMUTATIONS = _option(
    "--permutations", "n_permutations", type=click.IntRange(1), default=9999, show_default=True
)
_SAE = _option("--sae", help="Features of another SAE: NAME of features_NAME.")
_FEATURES = _option("--feature", "features", type=click.IntRange(0), multiple=True, required=True)
_WINDOW = _option("--window", type=click.IntRange(0), default=5, show_default=True, help="Tokens.")

# Function, help and options of each analysis.
_ANALYSES: dict[str, tuple[str, str, tuple[Callable[..., Any], ...]]] = {
    "attention-to": (
        "attention_to",
        "Attention from one place to others, by layer.",
        (
            _SOURCES,
            _TARGET,
            _HEADS,
            _option("--reduce", type=click.Choice(["mean", "sum"]), default="mean"),
        ),
    ),
    "feature-trajectory": (
        "feature_trajectory",
        "Features at a place, by layer.",
        (_FEATURES, _AT, _SAE),
    ),
    "pathway-features": (
        "pathway_features",
        "Features active at a span and at the decision, by activation × attention.",
        (_option("--source", type=Place(), required=True), _TARGET, _TOP, _SAE),
    ),
    "attention-locality": (
        "attention_locality",
        "Distance, entropy, share nearby and on the first token.",
        (_HEADS, _WINDOW, _option("--exclude-first", is_flag=True)),
    ),
    "layer-bands": (
        "layer_bands",
        "Test that attention is local, then about the task, then about the decision.",
        (_WINDOW, _option("--resamples", type=click.IntRange(99), default=9999), _SEED),
    ),
    "critical-layers": (
        "critical_layers",
        "Layers whose attention to a span stands out against control tokens.",
        (
            _SPANS,
            _TARGET,
            _option("--least-ratio", type=click.FloatRange(0), default=2.0, show_default=True),
            _PERMUTATIONS,
            _SEED,
        ),
    ),
    "attention-rollout": (
        "attention_rollout",
        "Attention rollout from spans to the decision.",
        (_SOURCES, _TARGET),
    ),
    "attention-flow": (
        "attention_flow",
        "Maximum flow of attention from spans to the decision.",
        (_SOURCES, _TARGET),
    ),
    "contrast": (
        "contrast",
        "What separates two groups of scenarios.",
        (
            _option("--group-a", help="A tag, or a value of --by.  [default: risky]"),
            _option("--group-b", help="A tag, or a value of --by.  [default: safe]"),
            _option("--by", help="Column of metadata; groups may be left out if it has 2 values."),
            _AT,
            _option("--what", type=click.Choice(["features", "attention"]), default="features"),
            _TARGET,
            _HEADS,
            _SAE,
            _PERMUTATIONS,
            _SEED,
        ),
    ),
    "position-specific-features": (
        "position_specific_features",
        "Features that fire at one kind of span and not elsewhere.",
        (_SPANS, _TOP, _option("--threshold", type=float, default=0.0), _SAE),
    ),
    "word-associations": (
        "word_associations",
        "Tokens that activate each feature most.",
        (
            _TOP,
            _option("--min-count", type=click.IntRange(1), default=1),
            _option("--strip", is_flag=True, help="Take ' bet' and 'bet' for one word."),
            _SAE,
        ),
    ),
    "crossreference": (
        "crossreference",
        "Do features that go with a word fire where attention goes to it?",
        (
            _option("--table", help="CSV or Parquet: layer, feature, word, score; else own words."),
            _SAE,
            _SEED,
        ),
    ),
    "head-roles": (
        "head_roles",
        "Previous-token, first-token, duplicate-token and induction scores of heads.",
        (),
    ),
    "decision": (
        "decision",
        "What the model would say next: the probability of each option, and entropy.",
        (),
    ),
    "relate": (
        "relate",
        "How attention to a span goes with an option's probability over scenarios.",
        (
            _option("--option", required=True, help="Name of an option, as bet."),
            _option("--source", type=Place(), required=True),
            _TARGET,
            _PERMUTATIONS,
            _SEED,
        ),
    ),
}


@click.group("analyze")
def command() -> None:
    """Answer a question from a run.

    Prints a table, or writes CSV, Parquet, NetCDF or JSON by the ending of --output.
    """


def _add(name: str, function: str, text: str, options: Sequence[Callable[..., Any]]) -> None:
    def run_analysis(**given: Any) -> None:
        _run(function, given)

    run_analysis.__doc__ = text
    wrapped: Callable[..., Any] = run_analysis
    for option in reversed(
        (
            run_argument,
            *options,
            _option("--output", "-o", type=PATH, help="File to write."),
            scheduler_option,
            workers_option,
            quiet_option,
        )
    ):
        wrapped = option(wrapped)
    command.command(name, help=text)(wrapped)


for _name, (_function, _text, _options) in _ANALYSES.items():
    _add(_name, _function, _text, _options)


def _run(function: str, given: dict[str, Any]) -> None:
    run, output = given.pop("run"), given.pop("output")
    quiet, scheduler, workers = given.pop("quiet"), given.pop("scheduler"), given.pop("workers")
    if output is not None and output.suffix not in _ENDINGS:
        raise click.UsageError(f"--output must end in one of {', '.join(_ENDINGS)}.")
    with computing(scheduler, workers, progress=show_progress(quiet=quiet)):
        result = _compute(function, _open(run, on_cluster="://" in scheduler), given).compute()
    if output is None:
        say(_table(result, shutil.get_terminal_size().columns))
    else:
        _write(result, output)


def _open(run: Location, *, on_cluster: bool) -> Any:
    """Open a run or a trace; in dask's blocks only what needs them, for they take time."""
    from zarrtrace.analysis.selecting import traces
    from zarrtrace.store import kind_of, open_run, open_trace

    reader = open_trace if kind_of(run) == "trace" else open_run
    data = reader(run)
    attention = [ds["attention"][:1].nbytes for ds in traces(data).values() if "attention" in ds]
    if on_cluster or max(attention, default=0) > _LARGE_LAYER:
        return reader(run, chunks="auto")
    return data


def _compute(function: str, data: Any, given: dict[str, Any]) -> Any:
    """Call an analysis; what was not given is left to its defaults."""
    from zarrtrace import analysis

    arguments = {name: _plain(value) for name, value in given.items() if value not in (None, ())}
    if function == "contrast":
        arguments |= _groups(data, arguments)
    if "sae" in arguments:
        data = analysis.of_sae(data, arguments.pop("sae"))
    if function == "relate":
        option = arguments.pop("option")
        places = {name: arguments.pop(name) for name in ("source", "target")}
        probability = analysis.decision(data)["probability"].sel(option=option)
        return analysis.relate(probability, analysis.attention_to(data, **places), **arguments)
    if function == "crossreference" and "table" not in arguments:
        arguments["table"] = analysis.word_associations(data)
    return getattr(analysis, function)(data, **arguments)


def _groups(data: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the groups of a contrast: tags, or values of a column as the column has them."""
    from zarrtrace.analysis.selecting import metadata

    if "by" not in given:
        return {"group_a": "risky", "group_b": "safe"} | dict(given)
    column = metadata(data).get(given["by"])
    values = [] if column is None or column.dtype == object else column.tolist()
    known = {str(value).lower(): value for value in values}
    groups = {name: text for name, text in given.items() if name in ("group_a", "group_b")}
    for name, text in groups.items():
        # 90 is also a way to write 90.0.
        same = [text.lower(), f"{text}.0"]
        groups[name] = next((known[one] for one in same if one in known), text)
    return groups


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _frame(result: xr.DataArray | xr.Dataset) -> pd.DataFrame:
    """One row a combination of labels, which come first; rows without a value are left out."""
    import xarray as xr

    if isinstance(result, xr.DataArray):
        result = result.to_dataset(name=result.name or "value")
    values = [str(name) for name in result.data_vars]
    frame = result.to_dataframe().dropna(how="all", subset=values).reset_index()
    if "feature" in values:
        frame = frame[frame["feature"] >= 0]  # places in a ranking that no feature takes
    numbers = {"row", "index"} - {*_metadata_of(result)}
    labels = [name for name in frame if name not in values and name not in numbers]
    return frame[[*labels, *values]]


def _parts(result: xr.DataArray | xr.Dataset) -> list[Any]:
    """Split a result into variables of the same dimensions, the smallest table first."""
    by_dims: dict[frozenset[Any], list[Any]] = {}
    if not hasattr(result, "data_vars"):
        return [result]
    for name, variable in result.data_vars.items():
        by_dims.setdefault(frozenset(variable.dims), []).append(name)
    parts = [result[names] for names in by_dims.values()]
    return sorted(parts, key=lambda part: max(v.size for v in part.data_vars.values()))


def _table(result: xr.DataArray | xr.Dataset, width: int) -> str:
    """Write a result for a terminal; of metadata, the columns that fit its width."""
    lines: list[str] = []
    for part in _parts(result):
        frame = _frame(part)
        extra = [name for name in frame if name in _metadata_of(part)]
        head = _on_lines(frame.head(_ROWS_SHOWN))
        shown = _as_text(head.drop(columns=extra))
        kept: list[Any] = []
        for name in extra:
            wider = _as_text(head.drop(columns=[one for one in extra if one not in (*kept, name)]))
            if len(wider.partition("\n")[0]) <= width:
                kept, shown = [*kept, name], wider
        lines += ["", shown] if lines else [shown]
        if len(kept) < len(extra):
            left = ", ".join(name for name in extra if name not in kept)
            lines.append(f"... too narrow for {left}; --output FILE writes them")
        if len(frame) > _ROWS_SHOWN:
            more = len(frame) - _ROWS_SHOWN
            lines.append(f"... {more} more rows; --output FILE writes all of them")
    for name in ("findings", "limits"):
        if result.attrs.get(name):
            found = result.attrs[name]
            lines += ["", *([found] if isinstance(found, str) else map(str, found))]
    return "\n".join(lines)


def _as_text(frame: pd.DataFrame) -> str:
    return frame.to_string(index=False, float_format="{:.4g}".format)


def _metadata_of(result: xr.DataArray | xr.Dataset) -> list[str]:
    """Name the coordinates of a result that hold metadata."""
    from zarrtrace.analysis.selecting import METADATA

    coords = result.coords.items()
    return [str(name) for name, one in coords if one.attrs.get("description") == METADATA]


def _on_lines(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose texts, names of columns included, are safe on one line."""
    texts = {name: frame[name].map(str) for name in frame if frame[name].dtype == object}
    safe = frame.assign(**{str(k): v.map(terminal_text) for k, v in texts.items()})
    return safe.rename(columns=lambda name: terminal_text(str(name)))


def _write(result: xr.DataArray | xr.Dataset, output: Path) -> None:
    if output.suffix == ".nc":
        _netcdf(result).to_netcdf(output, engine="h5netcdf")
        return
    frame = _frame(result)
    if output.suffix == ".csv":
        frame.to_csv(output, index=False)
    elif output.suffix == ".parquet":
        frame.to_parquet(output, index=False)
    else:
        import json

        content = {
            "attrs": result.attrs,
            "rows": json.loads(frame.to_json(orient="records", double_precision=15)),
        }
        output.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")


def _netcdf(result: xr.DataArray | xr.Dataset) -> xr.DataArray | xr.Dataset:
    """Return the result with attributes that NetCDF can hold: text and numbers."""
    import json

    out = result.copy()
    out.attrs = {
        name: value if isinstance(value, str | int | float) else json.dumps(value, default=str)
        for name, value in result.attrs.items()
        if value is not None
    }
    return out
