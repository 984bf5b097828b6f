"""``zarrtrace info``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command
from zarrtrace.cli.shared import json_option, json_text, run_argument, say, table
from zarrtrace.errors import readable
from zarrtrace.text import terminal_text

if TYPE_CHECKING:
    from zarrtrace.storage import Location
    from zarrtrace.store import RunSummary


@click.command(
    "info",
    cls=Command,
    examples=[("info runs/demo", ""), ("info s3://bucket/runs/demo --json", "")],
)
@run_argument
@json_option
def command(run: Location, as_json: bool) -> None:  # noqa: FBT001 -- click passes flags so
    """Show what RUN holds: scenarios, shapes, layers, sizes, model, SAEs, completeness.

    Exit code 3 if scenarios or layers are missing.
    """
    from zarrtrace.store import summarize

    summary = summarize(run)
    say(_json(summary) if as_json else as_text(summary))
    if not summary.complete:
        raise SystemExit(3)


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
