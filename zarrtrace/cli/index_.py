"""``zarrtrace index``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command, option
from zarrtrace.cli.shared import (
    computing,
    quiet_option,
    refuse_table,
    run_argument,
    say,
    scheduler_option,
    show_progress,
    threads_option,
    workers_option,
)

if TYPE_CHECKING:
    from zarrtrace.storage import Location


@click.command("index", cls=Command, examples=[("index runs/demo", "")])
@run_argument
@option("--rebuild", is_flag=True, help="Read all scenarios again.")
@threads_option
@workers_option
@scheduler_option
@quiet_option
def command(
    run: Location,
    rebuild: bool,  # noqa: FBT001 -- click passes flags so
    threads: int | None,
    workers: int | None,
    scheduler: str | None,
    quiet: bool,  # noqa: FBT001
) -> None:
    """Index the features of RUN, or add the scenarios that are not in its index.

    For each layer and feature: maximum, mean, frequency, and the 20 strongest tokens of all
    scenarios. 'zarrtrace find' answers from it in milliseconds. Exit code 3 if scenarios of the run
    are not complete, and so not in the index.
    """
    from zarrtrace.index import build_index

    refuse_table(
        run,
        "A table needs no index: a feature of all its samples is read in milliseconds.",
        f"Ask it at once: zarrtrace find {run} --layer N --feature N",
    )
    with computing(
        threads=threads,
        workers=workers,
        scheduler=scheduler,
        progress=show_progress(quiet=quiet),
    ):
        made = build_index(run, rebuild=rebuild)
    if not quiet:
        say(
            f"{run}: index {made.how}, {made.added} scenarios read, {made.indexed} of "
            f"{made.scenarios} in it"
        )
    if made.indexed < made.scenarios:
        raise SystemExit(3)
