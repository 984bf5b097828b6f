"""``zarrtrace analyze``: one subcommand an analysis."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from zarrtrace.cli.commands import QUESTION, Group, option
from zarrtrace.cli.shared import (
    PATH,
    computing,
    layers_option,
    output_option,
    quiet_option,
    refuse_run,
    run_argument,
    sae_option,
    say,
    scheduler_option,
    show_progress,
    threads_option,
    workers_option,
)
from zarrtrace.errors import ConfigError
from zarrtrace.suggestions import did_you_mean
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
    return option(*names, group=QUESTION, **settings)


_SOURCES = _option(
    "--source", type=Place(), multiple=True, help="Span or token position. Repeatable."
)
_SOURCE = _option("--source", type=Place(), required=True, help="Span or token position.")
_TARGET = _option(
    "--target",
    type=Place(),
    default="decision",
    show_default=True,
    help="Span or token position that attends.",
)
_AT = _option("--at", type=Place(), multiple=True, help="Span or token position. Repeatable.")
_SPANS = _option("--span", "spans", multiple=True, metavar="NAME", help="Only this. Repeatable.")
_HEADS = _option(
    "--heads",
    type=click.Choice(["mean", "each"]),
    default="mean",
    show_default=True,
    help="Their mean, or each by itself.",
)
_TOP = _option(
    "--top", type=click.IntRange(1), default=10, show_default=True, help="Results to list."
)
_SEED = _option(
    "--seed", type=int, default=0, show_default=True, help="Of the random numbers drawn."
)
_PERMUTATIONS = _option(
    "--permutations",
    "n_permutations",
    type=click.IntRange(1),
    default=9999,
    show_default=True,
    help="Permutations to draw.",
)
_COLUMN = _option(
    "--column",
    "target",
    required=True,
    metavar="COLUMN",
    help="Column of metadata: a number, or one of two values.",
)
_ARRAY = _option(
    "--what",
    type=click.Choice(["residual", "features"]),
    default="residual",
    show_default=True,
    help="To read it from.",
)
_GROUPS = _option(
    "--groups",
    metavar="COLUMN",
    help="Samples of one value stay together.  [default: scenario]",
)
_FEATURES = _option(
    "--feature",
    "features",
    type=click.IntRange(0),
    multiple=True,
    required=True,
    help="Index of the latent. Repeatable.",
)
_WINDOW = _option(
    "--window",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Tokens that count as nearby.",
)


class Analysis(NamedTuple):
    """One analysis: function, help, what follows RUN in the example, and options."""

    function: str
    text: str
    example: str = ""
    options: tuple[Callable[..., Any], ...] = ()


_ANALYSES: dict[str, Analysis] = {
    "attention-to": Analysis(
        "attention_to",
        "Attention from one place to others, by layer.",
        "--source balance --source goal -o attention.csv",
        (
            _SOURCES,
            _TARGET,
            _HEADS,
            _option(
                "--reduce",
                type=click.Choice(["mean", "sum"]),
                default="mean",
                show_default=True,
                help="Over the tokens of a span.",
            ),
        ),
    ),
    "feature-trajectory": Analysis(
        "feature_trajectory",
        "Features at a place, by layer.",
        "--feature 250 --at balance",
        (_FEATURES, _AT, sae_option),
    ),
    "pathway-features": Analysis(
        "pathway_features",
        "Features active at a span and at the decision, by activation × attention.",
        "--source balance",
        (_SOURCE, _TARGET, _TOP, sae_option),
    ),
    "attention-locality": Analysis(
        "attention_locality",
        "Distance, entropy, share nearby and on the first token.",
        "",
        (
            _HEADS,
            _WINDOW,
            _option("--exclude-first", is_flag=True, help="Leave out attention to token 0."),
        ),
    ),
    "layer-bands": Analysis(
        "layer_bands",
        "Test that attention is local, then about the task, then about the decision.",
        "",
        (
            _WINDOW,
            _option(
                "--resamples",
                type=click.IntRange(99),
                default=9999,
                show_default=True,
                help="Bootstrap samples to draw.",
            ),
            _SEED,
        ),
    ),
    "critical-layers": Analysis(
        "critical_layers",
        "Layers whose attention to a span stands out against control tokens.",
        "--span balance",
        (
            _SPANS,
            _TARGET,
            _option(
                "--least-ratio",
                type=click.FloatRange(0),
                default=2.0,
                show_default=True,
                help="Attention to the span over that to control tokens.",
            ),
            _PERMUTATIONS,
            _SEED,
        ),
    ),
    "attention-rollout": Analysis(
        "attention_rollout",
        "Attention rollout from spans to the decision.",
        "--source balance",
        (_SOURCES, _TARGET),
    ),
    "attention-flow": Analysis(
        "attention_flow",
        "Maximum flow of attention from spans to the decision.",
        "--source balance",
        (_SOURCES, _TARGET),
    ),
    "contrast": Analysis(
        "contrast",
        "What separates two groups of scenarios.",
        "--group-a risky --group-b safe",
        (
            _option("--group-a", metavar="TAG", help="Tag, or value of --by.  [default: risky]"),
            _option("--group-b", metavar="TAG", help="Tag, or value of --by.  [default: safe]"),
            _option(
                "--by",
                metavar="COLUMN",
                help="Column of metadata; groups may be left out if it has 2 values.",
            ),
            _AT,
            _option(
                "--what",
                type=click.Choice(["features", "attention"]),
                default="features",
                show_default=True,
                help="To compare.",
            ),
            _TARGET,
            _HEADS,
            sae_option,
            _PERMUTATIONS,
            _SEED,
        ),
    ),
    "position-specific-features": Analysis(
        "position_specific_features",
        "Features that fire at one kind of span and not elsewhere.",
        "--span balance",
        (
            _SPANS,
            _TOP,
            _option(
                "--threshold",
                type=float,
                default=0.0,
                show_default=True,
                help="A feature fires above this activation.",
            ),
            sae_option,
        ),
    ),
    "word-associations": Analysis(
        "word_associations",
        "Tokens that activate each feature most.",
        "--strip -o words.csv",
        (
            _TOP,
            _option(
                "--min-count",
                type=click.IntRange(1),
                default=1,
                show_default=True,
                help="Leave out words that stand in the prompts less often.",
            ),
            _option("--strip", is_flag=True, help="Take ' bet' and 'bet' for one word."),
            sae_option,
        ),
    ),
    "crossreference": Analysis(
        "crossreference",
        "Do features that go with a word fire where attention goes to it?",
        "",
        (
            _option(
                "--table",
                type=PATH,
                help="CSV or Parquet with layer, feature, word, score.  [default: own words]",
            ),
            sae_option,
            _SEED,
        ),
    ),
    "probe": Analysis(
        "probe",
        "How well a linear probe of each layer predicts a column on held-out groups.",
        "--column balance --what features",
        (
            _COLUMN,
            _ARRAY,
            _AT,
            _GROUPS,
            _option(
                "--confound",
                "confounds",
                multiple=True,
                metavar="COLUMN",
                help="Column that may predict it anyway. Repeatable.",
            ),
            _option(
                "--folds",
                type=click.IntRange(2),
                default=5,
                show_default=True,
                help="Parts that are held out in turn.",
            ),
            _option(
                "--permutations",
                "n_permutations",
                type=click.IntRange(0),
                default=999,
                show_default=True,
                help="Permutations to draw; 0 for no p.",
            ),
            _SEED,
            layers_option,
            sae_option,
        ),
    ),
    "directions": Analysis(
        "directions",
        "A direction a layer along which a column changes, as an array.",
        "--column balance --what features -o balance.nc",
        (
            _COLUMN,
            _ARRAY,
            _AT,
            _GROUPS,
            _option(
                "--method",
                type=click.Choice(["difference", "ridge"]),
                help="Of means, or weights.  [default: by the column]",
            ),
            layers_option,
            sae_option,
        ),
    ),
    "head-roles": Analysis(
        "head_roles", "Previous-token, first-token, duplicate-token and induction scores of heads."
    ),
    "decision": Analysis(
        "decision",
        "What the model would say next: the probability of each option, and entropy.",
        "-o decisions.csv",
    ),
    "relate": Analysis(
        "relate",
        "How attention to a span goes with an option's probability over scenarios.",
        "--option bet --source balance",
        (
            _option("--option", required=True, metavar="NAME", help="Name of an option, as bet."),
            _SOURCE,
            _TARGET,
            _PERMUTATIONS,
            _SEED,
        ),
    ),
}


@click.group(
    "analyze",
    cls=Group,
    examples=[
        ("analyze attention-to runs/demo --source balance", ""),
        ("analyze contrast runs/demo --help", "Options of one analysis:"),
    ],
)
def command() -> None:
    """Answer a question from a run.

    Prints a table, or writes CSV, Parquet, NetCDF or JSON by the ending of --output.
    """


def _add(name: str, analysis: Analysis) -> None:
    def run_analysis(**given: Any) -> None:
        _run(analysis.function, given)

    wrapped: Callable[..., Any] = run_analysis
    for decorator in reversed(
        (
            run_argument,
            *analysis.options,
            output_option("File to write: .csv, .parquet, .nc or .json.", type=PATH),
            threads_option,
            workers_option,
            scheduler_option,
            quiet_option,
        )
    ):
        wrapped = decorator(wrapped)
    example = f"analyze {name} runs/demo {analysis.example}".rstrip()
    command.command(name, help=analysis.text, examples=[(example, "")])(wrapped)


for _name, _analysis in _ANALYSES.items():
    _add(_name, _analysis)


def _run(function: str, given: dict[str, Any]) -> None:
    run, output, quiet = given.pop("run"), given.pop("output"), given.pop("quiet")
    where = {name: given.pop(name) for name in ("threads", "workers", "scheduler")}
    if output is not None:
        _check_output(output)
    with computing(**where, progress=show_progress(quiet=quiet)):
        data = _open(run, on_cluster=where["scheduler"] is not None)
        result = _compute(function, data, given).compute()
    if function == "probe" and (output is None or output.suffix != ".nc"):
        result = result.drop_dims("sample")  # predictions: another table
    if output is None:
        say(_table(result, shutil.get_terminal_size().columns))
    else:
        _write(result, output)


def _check_output(output: Path) -> None:
    """Refuse a file that cannot be written, before minutes of work."""
    if output.suffix not in _ENDINGS:
        raise click.UsageError(f"--output must end in one of {', '.join(_ENDINGS)}.")
    if not output.parent.is_dir():
        raise click.UsageError(f"--output {output}: there is no folder {output.parent}.")
    refuse_run(output)
    if output.is_dir():
        raise click.UsageError(f"--output {output}: is a folder; give a file.")


def _open(run: Location, *, on_cluster: bool, large_layer: int = _LARGE_LAYER) -> Any:
    """Open a run, a trace or a table; in dask's blocks only what needs them: they take time."""
    from zarrtrace.analysis.selecting import traces
    from zarrtrace.store import kind_of, open_run, open_table, open_trace

    kind = kind_of(run)
    if kind == "table":
        return open_table(run, chunks="auto" if on_cluster else None)
    reader = open_trace if kind == "trace" else open_run
    data = reader(run)
    attention = [ds["attention"][:1].nbytes for ds in traces(data).values() if "attention" in ds]
    if on_cluster or max(attention, default=0) > large_layer:
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
        chosen = arguments.pop("option")
        places = {name: arguments.pop(name) for name in ("source", "target")}
        probability = _of_option(analysis.decision(data)["probability"], chosen)
        return analysis.relate(probability, analysis.attention_to(data, **places), **arguments)
    if function == "crossreference" and "table" not in arguments:
        arguments["table"] = analysis.word_associations(data)
    return getattr(analysis, function)(data, **arguments)


def _of_option(probability: xr.DataArray, name: str) -> xr.DataArray:
    known = [str(one) for one in probability.indexes["option"]]
    if name not in known:
        raise ConfigError(
            f"--option {name}: no scenario has such an option",
            why="Options are named in the scenarios file.",
            remedy=did_you_mean(name, known),
        )
    return probability.sel(option=name)


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
        frame = _with_texts(_frame(part))
        extra = [name for name in frame if name in _metadata_of(part)]
        head = _on_lines(frame.head(_ROWS_SHOWN))
        shown = _as_text(head.drop(columns=extra))
        kept: list[Any] = []
        for name in extra:
            wider = _as_text(head.drop(columns=[one for one in extra if one not in (*kept, name)]))
            first = wider.partition("\n")[0]
            if len(first) <= width and not first.endswith("\\"):  # pandas broke the line
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


def _with_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with texts of tokens in quotes, and in place of their ids."""
    texts = [str(name) for name in frame if str(name).endswith("token_text")]
    shown = {name.removesuffix("_text"): frame[name].map(repr) for name in texts}
    if "word" in frame:  # most begin with a space
        shown["word"] = frame["word"].map(repr)
    return frame.assign(**shown).drop(columns=texts)


def _as_text(frame: pd.DataFrame) -> str:
    # Only where a person reads it: lines of a pipe are one row each.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return frame.to_string(index=False, float_format="{:.4g}".format, line_width=width)


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
