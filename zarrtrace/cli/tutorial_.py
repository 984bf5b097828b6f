"""``zarrtrace tutorial``."""

from __future__ import annotations

from pathlib import Path

import click

from zarrtrace.cli.commands import OUTPUT, Command, option
from zarrtrace.cli.shared import PATH, say


@click.command("tutorial", cls=Command, examples=[("tutorial", "")])
@option(
    "-o", "--output", type=PATH, default=Path(), metavar="FOLDER", group=OUTPUT,
    help="Folder to copy to, made if it is not there.  [default: the current folder]",
)  # fmt: skip
def command(output: Path) -> None:
    """Copy two notebooks here: prompts to a finding, and samples to a probe.

    Both run with the embedded model, without a GPU or a download.
    """
    from zarrtrace.demo import copy_tutorials

    copied = copy_tutorials(output)
    for file in copied:
        say(str(file))
    say("To run them: pip install jupyterlab, then")
    say(f"  jupyter lab {copied[0]}")
