"""``zarrtrace export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from zarrtrace.cli.shared import PATH, Layers, bar, quiet_option, run_argument, say

if TYPE_CHECKING:
    from zarrtrace.storage import Location


@click.command("export")
@run_argument
@click.option("--output", "-o", type=PATH, required=True, help="Folder to write to.")
@click.option("--scenario", multiple=True, help="Only this scenario; may be repeated.")
@click.option("--layers", type=Layers(), help="Only these layers, as 20-31.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), help="Convert; as stored if left out."
)
@click.option("--workers", type=click.IntRange(1), help="Threads; as many as cores if left out.")
@quiet_option
def command(
    run: Location,
    output: Path,
    scenario: tuple[str, ...],
    layers: tuple[int, ...] | None,
    dtype: Literal["float32", "float16"] | None,
    workers: int | None,
    quiet: bool,  # noqa: FBT001 -- click passes flags so
) -> None:
    """Write RUN as <output>/<scenario>/layer_N.npz and a metadata JSON.

    Prints the name of the metadata file.
    """
    from zarrtrace.npz import export_npz

    with bar("export", quiet=quiet) as progress:
        metadata = export_npz(
            run,
            output,
            scenarios=scenario or None,
            layers=layers,
            dtype=dtype,
            workers=workers,
            progress=progress,
        )
    say(str(metadata))
