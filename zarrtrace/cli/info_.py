"""``zarrtrace info``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command
from zarrtrace.cli.shared import json_option, json_text, run_argument, say, table
from zarrtrace.errors import NotATraceError, readable
from zarrtrace.text import terminal_text

if TYPE_CHECKING:
    from zarrtrace.storage import Location
    from zarrtrace.store import RunSummary, TableSummary

# Failed scenarios that are named; --json names all.
_FAILED_SHOWN = 5


@click.command(
    "info",
    cls=Command,
    examples=[("info runs/demo", ""), ("info s3://bucket/runs/demo --json", "")],
)
@run_argument
@json_option
def command(run: Location, as_json: bool) -> None:  # noqa: FBT001 -- click passes flags so
    """Show what RUN holds: scenarios, shapes, layers, sizes, model, SAEs, completeness.

    Exit code 3 if scenarios, layers or samples are missing.
    """
    from zarrtrace.store import summarize

    found = _table(run)
    summary = found or summarize(run)
    if as_json:
        say(json_text(summary.model_dump(mode="json")))
    else:
        say(table_as_text(found) if found else show(run))
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

    arrays = ", ".join(
        f"{name} ({' × '.join(map(str, shape))})" for name, shape in summary.arrays.items()
    )
    layers = ranges(summary.layers)
    if summary.layers_without_sae:
        layers += f" (no SAE: {ranges(summary.layers_without_sae)})"
    disk, dense = readable(summary.bytes_on_disk), readable(summary.bytes_dense)
    done = f"{summary.samples_done} of {summary.samples} samples"
    failed = [f"{name}: {reason}" for name, reason in summary.failed.items()]
    more = len(failed) - _FAILED_SHOWN
    lines = [
        f"table        {summary.path} (format version {summary.format_version})",
        f"model        {summary.model or 'not known'}",
        f"SAEs         {summary.sae_release or 'not known'}",
        f"layers       {layers}",
        f"arrays       {arrays}",
        f"samples      {summary.samples} of {summary.scenarios} scenarios",
        f"positions    {summary.positions}",
        f"metadata     {', '.join(summary.metadata) or 'none'}",
        f"complete     {'yes' if summary.complete else 'NO'}, {done}",
        f"failed       {len(failed) or 'none'}",
        *(f"             {one}" for one in failed[:_FAILED_SHOWN]),
        *([f"             and {more} more"] if more > 0 else []),
        f"size         {disk} on disk, {dense} dense, {summary.compression:.1f}×",
        f"files        {summary.files}",
    ]
    return "\n".join(map(terminal_text, lines))


def show(run: Location, *, as_json: bool = False) -> str:
    """Describe a run in words or JSON."""
    from zarrtrace.store import summarize

    summary = summarize(run)
    return _json(summary) if as_json else as_text(summary)


def _json(summary: RunSummary) -> str:
    return json_text(summary.model_dump(mode="json"))


def as_text(summary: RunSummary) -> str:
    """Describe a summary in words."""
    from zarrtrace.format.attributes import ranges

    lines = [f"run          {summary.path} (format version {summary.format_version})"]
    if summary.traces:
        first = summary.traces[0]
        lines += [
            f"model        {first.model or 'not known (imported)'}",
            f"SAEs         {_saes(summary)}",
            f"arrays       {_arrays(summary)}",
        ]
    done = sum(trace.complete for trace in summary.traces)
    total = len(summary.traces) + len(summary.scenarios_missing)
    disk, dense = readable(summary.bytes_on_disk), readable(summary.bytes_dense)
    lines += [
        f"complete     {'yes' if summary.complete else 'NO'}, {done} of {total} scenarios",
        f"size         {disk} on disk, {dense} dense, {summary.compression:.1f}×",
        "",
    ]
    rows = [
        [
            trace.scenario,
            str(trace.tokens),
            ranges(trace.layers),
            ranges(trace.missing_layers) or "none",
            readable(trace.bytes_on_disk),
            f"{trace.bytes_dense / max(1, trace.bytes_on_disk):.1f}×",
            ", ".join(trace.tags) or "-",
        ]
        for trace in summary.traces
    ] + [[name, "-", "-", "all", "-", "-", "-"] for name in summary.scenarios_missing]
    header = ["scenario", "tokens", "layers", "missing", "on disk", "ratio", "tags"]
    return "\n".join([*map(terminal_text, lines), table(header, rows)])


def _saes(summary: RunSummary) -> str:
    ids = summary.traces[0].sae_ids
    if not ids:
        return "none"
    release = summary.traces[0].sae_release
    return f"{len(ids)}, {ids[0]} to {ids[-1]}" + (f" of {release}" if release else "")


def _arrays(summary: RunSummary) -> str:
    first = summary.traces[0]
    return ", ".join(
        f"{name} ({' × '.join(map(str, first.arrays[name]))})"
        for name in ("attention", "features", "residual")
        if name in first.arrays
    )
