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

    Prints the page's address. The first 500 scenarios of a larger run are shown, or those of
    --scenario.
    """
    import contextlib
    import webbrowser

    from zarrtrace.viewer.server import serve

    refuse_table(
        run,
        "The page draws attention, and a table has none.",
        "Read it with zarrtrace.open_table, or ask 'zarrtrace analyze'; to look at some of its "
        "prompts, extract them without --layout table.",
    )
    shown = _shown(run, scenarios, show)
    if shown is not None and not scenarios and not quiet:
        say(
            f"{len(shown)} scenarios are shown, there are more; --scenario NAME shows others",
            err=True,
        )
    server = serve(run, host=host, port=port, scenarios=shown)
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


def _shown(run: Location, scenarios: tuple[str, ...], show: str) -> list[str] | None:
    """Return the scenarios to show: the first ones of a run of too many; None for all."""
    from urllib.parse import parse_qs

    from zarrtrace.store import kind_of, read_run
    from zarrtrace.viewer.layout import MOST_SCENARIOS

    if scenarios:
        return [*scenarios]
    if kind_of(run) == "trace":
        return None
    names = read_run(run).attributes.scenarios
    if len(names) <= MOST_SCENARIOS:
        return None
    asked = [name for name in parse_qs(show).get("scenario", []) if name in names]
    return [*dict.fromkeys([*asked, *names])][:MOST_SCENARIOS]
