"""``zarrtrace figures``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zarrtrace.cli.shared import PATH, bar, quiet_option, run_argument, say

if TYPE_CHECKING:
    from zarrtrace.storage import Location


class _Formats(click.ParamType[tuple[str, ...]]):
    """Endings of files: ``png``, ``pdf`` or ``png,pdf``."""

    name = "FORMATS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Parse a list of endings."""
        if isinstance(value, tuple):
            return value
        parts = tuple(part.strip().lower() for part in str(value).split(","))
        if not set(parts) <= {"png", "pdf"}:
            self.fail(f"{value!r} is not a list of png and pdf", param, ctx)
        return parts


@click.command("figures")
@run_argument
@click.option("--output", "-o", type=PATH, required=True, help="Folder to write to.")
@click.option(
    "--scenario", multiple=True,
    help="Draw only this scenario by itself; may be repeated. Figures over scenarios take all.",
)  # fmt: skip
@click.option("--format", "formats", type=_Formats(), default="png,pdf", show_default=True,
              help="What to write.")  # fmt: skip
@click.option("--dpi", type=click.IntRange(30, 1200), default=300, show_default=True,
              help="Of PNGs, and of images within PDFs.")  # fmt: skip
@quiet_option
def command(
    run: Location,
    output: Path,
    scenario: tuple[str, ...],
    formats: tuple[str, ...],
    dpi: int,
    quiet: bool,  # noqa: FBT001 -- click passes flags so
) -> None:
    """Draw RUN: attention, features, pathways and contrasts, and an index.html that shows them.

    Prints the name of the page. It says which figures could not be drawn, and why.
    """
    from zarrtrace.figures import draw_run

    with bar("figures", quiet=quiet) as progress:
        page = draw_run(
            run,
            output,
            scenarios=scenario or None,
            formats=formats,
            dpi=dpi,
            workers=os.cpu_count() or 1,
            progress=progress,
        )
    say(str(page))
