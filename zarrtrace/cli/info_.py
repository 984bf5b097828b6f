"""``zarrtrace info``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import PART, Command, option
from zarrtrace.cli.shared import bar, json_option, json_text, one_of, run_argument, say, table
from zarrtrace.errors import NotATraceError, readable
from zarrtrace.text import terminal_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zarrtrace.storage import Location
    from zarrtrace.store import ColumnSummary, RunSummary, TableSummary, TraceSummary

# Failed scenarios that are named; --json names all.
_FAILED_SHOWN = 5
# Columns of metadata of a table that are described, and characters of a line about one.
_COLUMNS_SHOWN, _LINE = 20, 78
# Characters of a generated text.
_TEXT = 12
#: Scenarios of a run that are listed.
FIRST = 50


@click.command(
    "info",
    cls=Command,
    examples=[
        ("info runs/demo", ""),
        ("info runs/large --first 200", "More of a run of thousands of scenarios:"),
        ("info s3://bucket/runs/demo --json", ""),
    ],
)
@run_argument
@option(
    "--first",
    group=PART,
    type=click.IntRange(1),
    help=f"List the first N scenarios.  [default: {FIRST}; with --json all]",
)
@option("--all", "everything", group=PART, is_flag=True, help="List all scenarios.")
@json_option
def command(run: Location, first: int | None, everything: bool, as_json: bool) -> None:  # noqa: FBT001 -- click passes flags so
    """Show what RUN holds: scenarios, shapes, layers, sizes, model, SAEs, completeness.

    Lists scenarios of a run; counts samples, failures and groups of metadata of a table. Exit code
    3 if scenarios, layers or samples are missing.
    """
    from zarrtrace.store import summarize

    one_of({"--first": first, "--all": everything or None})
    if first is None and not (everything or as_json):
        first = FIRST
    summary: RunSummary | TableSummary
    if (found := _table(run)) is not None:
        summary, text = found, table_as_text(found)
    else:
        with bar("info", quiet=False, unit="scenario") as progress:
            summary = summarize(run, first=first, progress=progress)
        text = as_text(summary, first)
    say(json_text(summary.model_dump(mode="json")) if as_json else text)
    if not summary.complete:
        raise SystemExit(3)


def _table(run: Location) -> TableSummary | None:
    """Summarise a table; None if there is none, nor one that is being written."""
    from zarrtrace.store import summarize_table

    with contextlib.suppress(NotATraceError):
        return summarize_table(run)
    return None


def table_as_text(summary: TableSummary) -> str:
    """Describe a table in words."""
    from zarrtrace.format.attributes import ranges

    layers = ranges(summary.layers)
    if summary.layers_without_sae:
        layers += f" (no SAE: {ranges(summary.layers_without_sae)})"
    disk, dense = readable(summary.bytes_on_disk), readable(summary.bytes_dense)
    done = f"{summary.samples_done:,} of {summary.samples:,} samples"
    failed = [f"{name}: {reason}" for name, reason in summary.failed.items()]
    more = len(failed) - _FAILED_SHOWN
    lines = [
        f"table        {summary.path} (format version {summary.format_version})",
        f"model        {summary.model or 'not known'}",
        f"SAEs         {_saes(summary.sae_ids, summary.sae_release)}",
        f"layers       {layers}",
        *_labelled("arrays", _arrays(summary.arrays)),
        f"samples      {summary.samples:,} of {summary.scenarios:,} scenarios",
        f"positions    {summary.positions}",
        *_labelled("metadata", _columns(summary)),
        f"complete     {'yes' if summary.complete else 'NO'}, {done}",
        f"failed       {f'{len(failed):,} scenarios' if failed else 'none'}",
        *(f"             {one}" for one in failed[:_FAILED_SHOWN]),
        *([f"             and {more:,} more; --json names all"] if more > 0 else []),
        f"size         {disk} on disk, {dense} dense, {summary.compression:.1f}×",
        f"files        {summary.files}",
    ]
    return "\n".join(map(terminal_text, lines))


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    """Write lines under a label, none of them wider than a terminal."""
    shown = [f"{label if not number else '':<13}{line}" for number, line in enumerate(lines)]
    return [line if len(line) <= _LINE else f"{line[: _LINE - 1]}…" for line in shown]


def _columns(summary: TableSummary) -> list[str]:
    """Describe tags and columns of metadata, one a line."""
    if not summary.columns:
        return [", ".join(summary.metadata) or "none"]
    lines = [f"{name}: {_column(one)}" for name, one in summary.columns.items()]
    more = len(lines) - _COLUMNS_SHOWN
    return lines[:_COLUMNS_SHOWN] + ([f"and {more} more; --json has all"] if more > 0 else [])


def _column(column: ColumnSummary) -> str:
    groups = ", ".join(f"{value} ({count:,})" for value, count in column.groups.items())
    if column.least is not None and not column.groups:
        groups = f"{column.least:g} to {column.greatest:g}, {column.distinct:,} values"
    said = groups or f"{column.distinct:,} values"
    return said + (f"; {column.missing:,} samples have none" if column.missing else "")


def show(run: Location, *, as_json: bool = False) -> str:
    """Describe a run or a table in words or JSON."""
    from zarrtrace.store import summarize

    if (found := _table(run)) is not None:
        return json_text(found.model_dump(mode="json")) if as_json else table_as_text(found)
    if as_json:
        return json_text(summarize(run).model_dump(mode="json"))
    return as_text(summarize(run, first=FIRST), FIRST)


def as_text(summary: RunSummary, most: int | None = None) -> str:
    """Describe a summary in words; list at most some scenarios."""
    from zarrtrace.format.attributes import ranges

    lines = [f"run          {summary.path} (format version {summary.format_version})"]
    if summary.traces:
        first = summary.traces[0]
        lines += [
            f"model        {first.model or 'not known (imported)'}",
            f"SAEs         {_saes(first.sae_ids, first.sae_release)}",
            *_labelled("arrays", _arrays(first.arrays)),
        ]
    done, total = summary.scenarios_complete, summary.scenarios
    later = total - len(summary.traces) - len(summary.scenarios_missing)
    of = f" (of {len(summary.traces):,} scenarios)" if later else ""
    disk, dense = readable(summary.bytes_on_disk), readable(summary.bytes_dense)
    lines += [
        f"complete     {'yes' if summary.complete else 'NO'}, {done:,} of {total:,} scenarios",
        f"size         {disk} on disk, {dense} dense, {summary.compression:.1f}×{of}",
        "",
    ]
    has_texts = any(trace.completion is not None for trace in summary.traces)
    texts = ["choice", "completion"] if has_texts else []
    rows = [
        [
            trace.scenario,
            str(trace.tokens),
            ranges(trace.layers),
            ranges(trace.missing_layers) or "none",
            readable(trace.bytes_on_disk),
            f"{trace.bytes_dense / max(1, trace.bytes_on_disk):.1f}×",
            ", ".join(trace.tags) or "-",
            *([trace.choice or "-", _completion(trace)] if has_texts else []),
        ]
        for trace in summary.traces
    ] + [
        [name, "-", "-", "all", "-", "-", "-", *("-" for _ in texts)]
        for name in summary.scenarios_missing
    ]
    header = ["scenario", "tokens", "layers", "missing", "on disk", "ratio", "tags", *texts]
    shown = rows[:most]
    more = total - len(shown)
    said = [f"... {more:,} more scenarios; --first N or --all lists them"] if more else []
    return "\n".join([*map(terminal_text, lines), table(header, shown), *said])


def _completion(trace: TraceSummary) -> str:
    """Write the beginning of a generated text in quotes."""
    if trace.completion is None:
        return "-"
    text = trace.completion
    return repr(text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…")


def _saes(ids: Sequence[str], release: str | None) -> str:
    if not ids:
        return "none"
    return f"{len(ids)}, {ids[0]} to {ids[-1]}" + (f" of {release}" if release else "")


def _arrays(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Describe the arrays that were extracted, one a line; not those made of them."""
    return [
        f"{name} ({' × '.join(map(str, shape))})"
        for name, shape in shapes.items()
        if name in ("attention", "next_token", "residual") or name.startswith("features")
    ]
