"""``zarrtrace index``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command, option
from zarrtrace.cli.shared import (
    computing,
    quiet_option,
    run_argument,
    say,
    scheduler_option,
    show_progress,
    special_option,
    threads_option,
    workers_option,
)

if TYPE_CHECKING:
    from zarrtrace.storage import Location


@click.command("index", cls=Command, examples=[("index runs/demo", "")])
@run_argument
@option("--rebuild", is_flag=True, help="Read all scenarios again.")
@special_option
@threads_option
@workers_option
@scheduler_option
@quiet_option
def command(
    run: Location,
    rebuild: bool,  # noqa: FBT001 -- click passes flags so
    special: bool,  # noqa: FBT001
    threads: int | None,
    workers: int | None,
    scheduler: str | None,
    quiet: bool,  # noqa: FBT001
) -> None:
    """Index the features of RUN, a run or a table, or add the scenarios that its index lacks.

    For each layer and feature: maximum, mean, frequency, and the 20 strongest tokens of all
    scenarios; special tokens (BOS, chat markers) are left out unless asked for. 'zarrtrace find'
    answers from it in milliseconds. Exit code 3 if scenarios are not complete, or failed, and so
    are not in the index.
    """
    from zarrtrace.index import build_index

    with computing(
        threads=threads,
        workers=workers,
        scheduler=scheduler,
        progress=show_progress(quiet=quiet),
    ):
        made = build_index(run, rebuild=rebuild, special=special)
    if not quiet:
        say(
            f"{run}: index {made.how}, {made.added} scenarios read, {made.indexed} of "
            f"{made.scenarios} in it"
        )
    if made.indexed < made.scenarios:
        raise SystemExit(3)
