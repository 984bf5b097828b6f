"""``zarrtrace import``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zarrtrace.cli.shared import (
    PATH,
    Address,
    Layers,
    bar,
    overwrite_option,
    quiet_option,
    say,
    storage_option,
)

if TYPE_CHECKING:
    from zarrtrace.storage import Location


@click.command("import")
@click.argument("folder", type=PATH)
@click.option(
    "--output", "-o", type=Address(), required=True, help="Folder of the run, or its address."
)
@storage_option
@click.option("--layers", type=Layers(), help="Only these layers, as 20-31.")
@click.option("--metadata", help="Name of the metadata JSON, if FOLDER holds several.")
@click.option("--workers", type=click.IntRange(1), help="Threads; as many as cores if left out.")
@overwrite_option
@quiet_option
def command(
    folder: Path,
    output: Location,
    layers: tuple[int, ...] | None,
    metadata: str | None,
    workers: int | None,
    overwrite: bool,  # noqa: FBT001 -- click passes flags so
    quiet: bool,  # noqa: FBT001
) -> None:
    """Turn FOLDER, in the documented layer_N.npz layout, into a run."""
    from zarrtrace.npz import import_npz

    with bar("import", quiet=quiet) as progress:
        import_npz(
            folder,
            output,
            layers=layers,
            metadata=metadata,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
    if not quiet:
        from zarrtrace.cli.info_ import show
        from zarrtrace.npz.plausibility import NOT_TOLD

        say(show(output))
        say(NOT_TOLD, err=True)
