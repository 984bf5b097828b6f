"""``zarrtrace analyze``: one subcommand an analysis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from zarrtrace.cli.commands import Group
from zarrtrace.cli.feature_names import feature_namer
from zarrtrace.cli.results import check_output, write_result
from zarrtrace.cli.rows import choice_of, row_options
from zarrtrace.cli.shared import (
    PATH,
    computing,
    output_option,
    quiet_option,
    run_argument,
    say,
    scheduler_option,
    show_progress,
    threads_option,
    workers_option,
)
from zarrtrace.cli.tables import LAYOUTS, Layout, text_of
from zarrtrace.errors import ConfigError
from zarrtrace.suggestions import did_you_mean

if TYPE_CHECKING:
    import xarray as xr

    from zarrtrace.storage import Location
from zarrtrace.cli.analysis_options import ANALYSES, FEATURES, Analysis

# Bytes of attention in a layer of 1,024 tokens and 32 heads; more is not read at once.
_LARGE_LAYER = 2**27


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

    Prints the answer in a sentence and its strongest rows, or writes all rows as CSV, Parquet,
    NetCDF or JSON by the ending of --output.
    """


def _add(name: str, analysis: Analysis) -> None:
    def run_analysis(**given: Any) -> None:
        _run(name, analysis.function, given)

    wrapped: Callable[..., Any] = run_analysis
    for decorator in reversed(
        (
            run_argument,
            *analysis.options,
            *row_options(LAYOUTS.get(name, Layout()), has_features=FEATURES in analysis.options),
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


for _name, _analysis in ANALYSES.items():
    _add(_name, _analysis)


def _run(name: str, function: str, given: dict[str, Any]) -> None:
    from zarrtrace.analysis.findings import with_findings

    run, output, quiet = given.pop("run"), given.pop("output"), given.pop("quiet")
    where = {name: given.pop(name) for name in ("threads", "workers", "scheduler")}
    layout, choice = LAYOUTS.get(name, Layout()), choice_of(given)
    if output is not None:
        check_output(output, choice)
    with computing(**where, progress=show_progress(quiet=quiet)):
        data = _open(run, on_cluster=where["scheduler"] is not None)
        result = with_findings(_compute(function, data, given).compute())
        if function == "probe" and (output is None or output.suffix != ".nc"):
            result = result.drop_dims("sample")  # predictions: another table
    namer = feature_namer(run, given.get("sae"))
    if output is None:
        say(text_of(result, layout, choice, namer))
    else:
        write_result(result, output, layout, choice, namer)


def _open(run: Location, *, on_cluster: bool, large_layer: int = _LARGE_LAYER) -> Any:
    """Open a run, a trace or a table; in dask's blocks only what needs them: they take time."""
    from zarrtrace.analysis.traces import traces
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
    if "bands" in arguments:
        arguments["bands"] = dict(arguments["bands"])
    if "sae" in arguments:
        data = analysis.of_sae(data, arguments.pop("sae"))
    if function == "relate":
        chosen = arguments.pop("option")
        places = {name: arguments.pop(name) for name in ("source", "target")}
        if arguments.pop("chosen"):
            outcome = analysis.chose(data, chosen)
        else:
            outcome = _of_option(analysis.decision(data)["probability"], chosen)
        return analysis.relate(outcome, analysis.attention_to(data, **places), **arguments)
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
    from zarrtrace.analysis.traces import metadata

    if "by" not in given:
        return {}
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
