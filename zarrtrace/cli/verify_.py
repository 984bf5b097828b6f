"""``zarrtrace verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command
from zarrtrace.cli.shared import (
    bar,
    json_option,
    json_text,
    quiet_option,
    run_argument,
    say,
    table,
)

if TYPE_CHECKING:
    from zarrtrace.storage import Location


@click.command("verify", cls=Command, examples=[("verify runs/demo", "")])
@run_argument
@json_option
@quiet_option
def command(run: Location, as_json: bool, quiet: bool) -> None:  # noqa: FBT001 -- click passes flags so
    """Read every byte of RUN and compare it with its checksums.

    Names every damaged or missing layer. Exit code 1 if there is one.
    """
    from zarrtrace.store import kind_of, verify

    unit = "scenario" if kind_of(run) == "run" else "B"
    with bar("verify", quiet=quiet, unit=unit) as progress:
        problems = verify(run, progress=progress)
    if as_json:
        say(json_text([problem.model_dump() for problem in problems]))
    elif problems:
        rows = [
            [
                problem.scenario or "(the run)",
                problem.array or "-",
                "-" if problem.layer is None else str(problem.layer),
                problem.chunk or "-",
                problem.message,
            ]
            for problem in problems
        ]
        say(table(["scenario", "array", "layer", "chunk", "problem"], rows))
    elif not quiet:
        say(f"{run}: everything is there and as it was written")
    if problems:
        raise SystemExit(1)
