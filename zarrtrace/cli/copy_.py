"""``zarrtrace copy``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command
from zarrtrace.cli.shared import Address, bar, quiet_option, say, storage_option, target_option
from zarrtrace.errors import readable

if TYPE_CHECKING:
    from zarrtrace.storage import Location


# Scenarios left out that are named.
_NAMED = 5


@click.command(
    "copy",
    cls=Command,
    examples=[
        ("copy runs/demo s3://bucket/runs/demo", ""),
        ("copy s3://bucket/runs/demo runs/demo --storage-option endpoint=http://host:9000", ""),
    ],
)
@click.argument("source", type=Address())
@click.argument("target", type=Address(of_target=True))
@quiet_option
@storage_option
@target_option
def command(source: Location, target: Location, quiet: bool) -> None:  # noqa: FBT001 -- click
    """Copy the run or trace SOURCE to TARGET: folders, or addresses in object stores.

    Every byte is compared with the source's checksums, when it is read and as it arrived. A copy
    that was interrupted goes on when the same command is run again. Exit code 3 if scenarios are
    not complete, and so are not in the copy.
    """
    from zarrtrace.store import copy_run

    if source.resolved() == target.resolved():
        raise click.UsageError(f"SOURCE and TARGET are the same: {source}.")
    with bar("copy", quiet=quiet, unit="B") as progress:
        done = copy_run(source, target, progress=progress)
    if not quiet:
        many = f"{done.scenarios} scenarios"
        if done.missing:
            many = f"{done.scenarios} of {done.scenarios + len(done.missing)} scenarios"
        say(
            f"{target}: {many}, {readable(done.bytes)} copied and verified, "
            f"{readable(done.bytes_there)} were there"
        )
    if done.missing:
        more = len(done.missing) - _NAMED
        named = ", ".join(done.missing[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        say(
            f"zarrtrace: not complete, left out of the copy: {named}\nResume the extraction first: "
            "run the same 'zarrtrace extract' again, then copy once more.",
            err=True,
        )
        raise SystemExit(3)
