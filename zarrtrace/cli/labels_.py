"""``zarrtrace labels``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command, option
from zarrtrace.cli.shared import PATH, quiet_option, run_argument, say, table

if TYPE_CHECKING:
    from zarrtrace.storage import Location


@click.command(
    "labels",
    cls=Command,
    examples=[
        ("labels runs/demo labels.csv", ""),
        ("labels runs/demo batch-0.jsonl.gz batch-1.jsonl.gz", ""),
        ("labels runs/demo", "How many there are:"),
    ],
)
@run_argument
@click.argument("files", nargs=-1, metavar="[FILE]...", type=PATH)
@option("--replace", is_flag=True, help="Remove all labels that are there.")
@quiet_option
def command(
    run: Location,
    files: tuple[Path, ...],
    replace: bool,  # noqa: FBT001 -- click passes flags so
    quiet: bool,  # noqa: FBT001
) -> None:
    """Store labels of features with RUN, a run or a table; without FILE, count them.

    FILE is CSV or Parquet with columns layer, feature, label, or JSONL of explanations as
    Neuronpedia exports them, of SAEs that the run has. 'find', 'analyze', figures and the viewer
    show labels beside the numbers; 'zarrtrace find --label TEXT' searches them.
    """
    from zarrtrace.index import read_labels, write_labels

    if not files:
        if replace:
            raise click.UsageError("--replace: with what? Give a FILE.")
        from zarrtrace.store import kind_of

        kind_of(run)  # raises if there is neither a run nor a table
        counts = read_labels(run).groupby(["array", "layer"]).size().reset_index()
        rows = [[str(cell) for cell in row] for row in counts.itertuples(index=False)]
        say(table(["array", "layer", "labels"], rows) if rows else f"{run}: no labels")
        return
    done = write_labels(run, files, replace=replace)
    if not quiet:
        left = done.left_out()
        say(f"{run}: {done.added:,} labels read, {done.stored:,} features have one")
        say(f"left out: {left}" if left else "no row was left out")
