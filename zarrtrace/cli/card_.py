"""``zarrtrace card``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command, option
from zarrtrace.cli.shared import run_argument, say

if TYPE_CHECKING:
    from zarrtrace.storage import Location


@click.command("card", cls=Command, examples=[("card runs/demo --license cc-by-4.0", "")])
@run_argument
@option(
    "--license",
    "license_id",
    metavar="ID",
    help="Identifier as the Hub lists them: cc-by-4.0, mit.",
)
@option("--title", help="Heading.  [default: the folder's name]")
def command(run: Location, license_id: str | None, title: str | None) -> None:
    """Make RUN, or a table, a Hugging Face dataset folder: write README.md with its card.

    Uploads nothing. Refuses to replace a README that it did not write. Prints its name.
    """
    from zarrtrace.card import write_card

    say(str(write_card(run, license=license_id, title=title)))
