"""``zarrtrace export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from zarrtrace.cli.commands import OUTPUT, Command, option
from zarrtrace.cli.shared import (
    PATH,
    bar,
    layers_option,
    output_option,
    quiet_option,
    refuse_run,
    run_argument,
    say,
    scenario_option,
    threads_option,
)

if TYPE_CHECKING:
    from zarrtrace.storage import Location


@click.command(
    "export",
    cls=Command,
    examples=[
        ("export runs/demo -o demo-npz", ""),
        ("export runs/demo -o part --scenario Risky_40 --layers 20-31", "A part:"),
    ],
)
@run_argument
@scenario_option
@layers_option
@output_option("Folder to write to.", type=PATH, required=True)
@option(
    "--output-dtype",
    group=OUTPUT,
    type=click.Choice(["float32", "float16"]),
    help="Convert values.  [default: as stored]",
)
@threads_option
@quiet_option
def command(
    run: Location,
    output: Path,
    scenarios: tuple[str, ...],
    layers: tuple[int, ...] | None,
    output_dtype: Literal["float32", "float16"] | None,
    threads: int | None,
    quiet: bool,  # noqa: FBT001 -- click passes flags so
) -> None:
    """Write RUN as <output>/<scenario>/layer_N.npz and a metadata JSON.

    Prints the name of the metadata file.
    """
    from zarrtrace.npz import export_npz

    refuse_run(output)
    with bar("export", quiet=quiet) as progress:
        metadata = export_npz(
            run,
            output,
            scenarios=scenarios or None,
            layers=layers,
            output_dtype=output_dtype,
            threads=threads,
            progress=progress,
        )
    say(str(metadata))
