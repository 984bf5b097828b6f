"""``zarrtrace export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from zarrtrace.cli.commands import OUTPUT, PART, Command, option
from zarrtrace.cli.option_types import PositionsType
from zarrtrace.cli.shared import (
    PATH,
    bar,
    layers_option,
    output_option,
    quiet_option,
    run_argument,
    say,
    scenario_option,
    threads_option,
)

if TYPE_CHECKING:
    from zarrtrace.scenarios.positions import Positions
    from zarrtrace.storage import Location

    Format = Literal["npz", "coo", "hidden", "safetensors", "parquet"]


@click.command(
    "export",
    cls=Command,
    examples=[
        ("export runs/demo -o demo-npz", ""),
        ("export runs/demo -o part --scenario Risky_40 --layers 20-31", "A part:"),
        ("export runs/demo -o coo --to coo", "Features of each prompt's last token:"),
        ("export runs/demo -o rows --to parquet --at balance,goal", "Tokens of two spans:"),
    ],
)
@run_argument
@scenario_option
@layers_option
@option(
    "--at",
    group=PART,
    type=PositionsType(),
    help="Positions that are samples: all, last, spans, names of spans, or positions as 0,5,-1. "
    "Not for npz.  [default: last; of a table all]",
)
@output_option("Folder to write to.", type=PATH, required=True)
@option(
    "--to",
    group=OUTPUT,
    type=click.Choice(["npz", "coo", "hidden", "safetensors", "parquet"]),
    default="npz",
    show_default=True,
    help="npz: <scenario>/layer_N.npz. The others hold samples: coo features, hidden the residual "
    "stream, safetensors and parquet both.",
)
@option(
    "--output-dtype",
    group=OUTPUT,
    type=click.Choice(["float32", "float16"]),
    help="Convert values.  [default: as stored]",
)
@option(
    "--overwrite",
    group=OUTPUT,
    is_flag=True,
    help="Replace an export in the same format that is there, or was interrupted.",
)
@threads_option
@quiet_option
def command(
    run: Location,
    output: Path,
    to: Format,
    at: Positions | None,
    scenarios: tuple[str, ...],
    layers: tuple[int, ...] | None,
    output_dtype: Literal["float32", "float16"] | None,
    threads: int | None,
    overwrite: bool,  # noqa: FBT001 -- click passes flags so
    quiet: bool,  # noqa: FBT001
) -> None:
    """Write RUN in a format that other tools read.

    By default as <output>/<scenario>/layer_N.npz and a metadata JSON, whose name is printed. The
    other formats hold one row a sample: a position of a prompt, by default its last.
    """
    from zarrtrace.exports import export

    with bar("export", quiet=quiet, unit="file" if to == "npz" else "row") as progress:
        written = export(
            run,
            output,
            to=to,
            at=-1 if at == "last" else at,
            scenarios=scenarios or None,
            layers=layers,
            output_dtype=output_dtype,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    say(str(written))
