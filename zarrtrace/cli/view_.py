"""``zarrtrace view``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command, option
from zarrtrace.cli.shared import quiet_option, run_argument, say

if TYPE_CHECKING:
    from zarrtrace.storage import Location


@click.command(
    "view",
    cls=Command,
    examples=[
        ("view runs/demo", ""),
        (
            "view runs/demo --no-browser --port 8000",
            "On a machine without a browser, behind ssh -L 8000:localhost:8000:",
        ),
    ],
)
@run_argument
@option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; if others can reach it, the page's address holds a secret.",
)
@option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port to listen on.  [default: a free one]",
)
@option(
    "--show",
    default="",
    metavar="VIEW",
    help="First view, written as behind # in the page's address: scenario=NAME&layer=25.",
)
@option("--no-browser", is_flag=True, help="Only print the address.")
@quiet_option
def command(run: Location, host: str, port: int, show: str, no_browser: bool, quiet: bool) -> None:  # noqa: FBT001 -- click passes flags so
    """Look at RUN in the browser, from this machine, until Ctrl-C.

    Prints the page's address.
    """
    import contextlib
    import webbrowser

    from zarrtrace.viewer.server import serve

    server = serve(run, host=host, port=port)
    url = f"{server.url}#{show}" if show else server.url
    say(url)
    if not quiet:
        say("Ctrl-C stops.", err=True)
    if not no_browser:
        webbrowser.open(url)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    finally:
        server.close()
