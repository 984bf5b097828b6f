"""``zarrtrace figures``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zarrtrace.cli.commands import OUTPUT, PART, Command, option
from zarrtrace.cli.shared import (
    PATH,
    bar,
    output_option,
    quiet_option,
    refuse_table,
    run_argument,
    say,
    special_option,
)

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


@click.command(
    "figures",
    cls=Command,
    examples=[
        ("figures runs/demo", "Into runs/demo-figures:"),
        ("figures runs/demo -o paper --scenario Risky_40 --format pdf", ""),
    ],
)
@run_argument
@option(
    "--scenario",
    "scenarios",
    group=PART,
    multiple=True,
    metavar="NAME",
    help="Only this single scenario. Repeatable. Figures over scenarios take all.",
)
@special_option
@output_option("Folder to write to.  [default: RUN-figures, beside RUN]", type=PATH)
@option(
    "--format",
    "formats",
    group=OUTPUT,
    type=_Formats(),
    default="png",
    show_default=True,
    help="Kinds of files: png, pdf or png,pdf.",
)
@option(
    "--dpi",
    group=OUTPUT,
    type=click.IntRange(30, 1200),
    default=300,
    show_default=True,
    help="Resolution of PNGs, and of images within PDFs.",
)
@option(
    "--overwrite",
    group=OUTPUT,
    is_flag=True,
    help="Replace files, too, that this command did not write.",
)
@quiet_option
def command(
    run: Location,
    output: Path | None,
    scenarios: tuple[str, ...],
    formats: tuple[str, ...],
    dpi: int,
    special: bool,  # noqa: FBT001
    overwrite: bool,  # noqa: FBT001
    quiet: bool,  # noqa: FBT001 -- click passes flags so
) -> None:
    """Draw RUN: attention, features, pathways and contrasts, and an index.html that shows them.

    Prints the name of the page. It says which figures could not be drawn, and why. At most
    50 scenarios are drawn one by one, and 1,000 compared: evenly spaced ones, as the page says.
    RUN/SCENARIO stands for RUN --scenario SCENARIO, and is drawn into RUN-figures-SCENARIO.
    """
    from zarrtrace.figures import draw_run
    from zarrtrace.figures.page import run_of, sampled
    from zarrtrace.store import read_run

    if output is None and run.path is None:
        raise click.UsageError(f"Give --output: nothing is drawn into an object store ({run}).")
    refuse_table(
        run,
        "The figures draw attention, and a table has none.",
        "'zarrtrace analyze contrast', for example, takes tables; zarrtrace.figures draws such a "
        "result.",
    )
    given, (run, names) = run, run_of(run, scenarios or None)
    output = output or _beside(run, names[0] if names and run is not given else None)
    if not quiet and (note := sampled(read_run(run).attributes.scenarios, names)):
        say(note, err=True)
    with bar("figures", quiet=quiet, unit="figure") as progress:
        page = draw_run(
            run,
            output,
            scenarios=names,
            formats=formats,
            dpi=dpi,
            special=special,
            overwrite=overwrite,
            workers=os.cpu_count() or 1,
            progress=progress,
        )
    say(str(page))


def _beside(run: Location, scenario: str | None) -> Path:
    """Return the folder for figures of a run on a disk, or of one of its traces."""
    path = Path(run)
    folder = path if path.name not in ("", "..") else path.resolve()
    return folder.with_name(f"{folder.name}-figures" + (f"-{scenario}" if scenario else ""))
