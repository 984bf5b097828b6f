"""``zarrtrace view``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import Command, option
from zarrtrace.cli.shared import (
    quiet_option,
    refuse_table,
    run_argument,
    say,
    scenario_option,
)

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
@scenario_option
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
def command(
    run: Location,
    scenarios: tuple[str, ...],
    host: str,
    port: int,
    show: str,
    no_browser: bool,  # noqa: FBT001 -- click passes flags so
    quiet: bool,  # noqa: FBT001
) -> None:
    """Look at RUN in the browser, from this machine, until Ctrl-C.

    Prints the page's address. Words and contrasts of features read every scenario: a run of more
    than 500 is shown without them.
    """
    import contextlib
    import webbrowser

    from zarrtrace.viewer.server import serve
    from zarrtrace.viewer.traces import MOST_SCENARIOS

    refuse_table(
        run,
        "The page draws attention, and a table has none.",
        "Read it with zarrtrace.open_table, or ask 'zarrtrace analyze'; to look at some of its "
        "prompts, extract them without --layout table.",
    )
    server = serve(run, host=host, port=port, scenarios=scenarios or None)
    traces = server.layout.traces
    if traces.is_large and not quiet:
        say(
            f"{len(traces):,} scenarios: without contrasts of features and the words that drive "
            f"them; --scenario NAME shows some, up to {MOST_SCENARIOS} with them",
            err=True,
        )
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
