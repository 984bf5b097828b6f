"""``zarrtrace bundle``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zarrtrace.cli.commands import OUTPUT, Command, option
from zarrtrace.cli.shared import (
    PATH,
    bar,
    layers_option,
    output_option,
    overwrite_option,
    quiet_option,
    refuse_table,
    run_argument,
    say,
    scenario_option,
)
from zarrtrace.errors import readable

if TYPE_CHECKING:
    from zarrtrace.storage import Location

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


class Size(click.ParamType[int]):
    """A number of bytes: ``500MB``, ``1.5 GB``."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a number with a unit."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)b?\s*", str(value).lower())
        if not found:
            self.fail(f"{value!r} is not a size like 500MB or 1.5GB", param, ctx)
        return int(float(found[1]) * _UNITS[found[2]])


@click.command(
    "bundle",
    cls=Command,
    examples=[
        ("bundle runs/demo -o demo", "A folder for any web host:"),
        ("bundle runs/demo -o demo.html --scenario Risky_40 --layers 20-31", "One page:"),
    ],
)
@run_argument
@scenario_option
@layers_option
@output_option(
    "Folder, or a file ending in .html for one self-contained page.", type=PATH, required=True
)
@option("--max-size", group=OUTPUT, type=Size(), help="Refuse to write more, as 500MB.")
@overwrite_option
@quiet_option
def command(
    run: Location,
    output: Path,
    scenarios: tuple[str, ...],
    layers: tuple[int, ...] | None,
    max_size: int | None,
    overwrite: bool,  # noqa: FBT001 -- click passes flags so
    quiet: bool,  # noqa: FBT001
) -> None:
    """Write RUN with its viewer: a folder that any web host serves, or one HTML file.

    Says the size first, then writes and prints the path.
    """
    from zarrtrace.viewer.bundle import plan, refuse_larger, write_bundle

    refuse_table(
        run,
        "The page draws attention, and a table has none.",
        "Publish the table's folder as it is ('zarrtrace card' describes it), or write it with "
        "'zarrtrace export --to parquet'.",
    )
    layout, expected = plan(run, output, scenarios=scenarios or None, layers=layers)
    rounded = "; attention rounded to 8 bits" if expected.eight_bit else ""
    if not quiet:
        say(
            f"about {readable(expected.bytes)} in {expected.files} file"
            f"{'' if expected.files == 1 else 's'}{rounded}",
            err=True,
        )
    refuse_larger(expected.bytes, max_size)
    with bar("bundle", quiet=quiet) as progress:
        written = write_bundle(
            layout, output, max_bytes=max_size, overwrite=overwrite, progress=progress
        )
    if not quiet:
        say(f"{readable(written)} written", err=True)
    say(str(output))
