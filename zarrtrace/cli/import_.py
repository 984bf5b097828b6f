"""``zarrtrace import``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zarrtrace.cli.commands import PART, PROMPTS, Command, option
from zarrtrace.cli.shared import (
    PATH,
    Address,
    bar,
    layers_option,
    output_option,
    overwrite_option,
    quiet_option,
    say,
    storage_option,
    threads_option,
)

if TYPE_CHECKING:
    from zarrtrace.storage import Location
    from zarrtrace.store import RunSummary


@click.command(
    "import",
    cls=Command,
    examples=[
        ("import demo-npz -o runs/again", ""),
        (
            "import phase_a_hidden_states.npz -o runs/hidden --layers 0-30",
            "Hidden states become a table; --metadata FILE names what each row is:",
        ),
        (
            "import other-npz -o runs/other --scenarios mine.yaml",
            "Tags come from the file of scenarios:",
        ),
    ],
)
@click.argument("source", type=PATH)
@layers_option
@option(
    "--metadata",
    group=PART,
    metavar="NAME",
    help="Name of the metadata JSON, if SOURCE holds several; of hidden states, a CSV or Parquet "
    "file with a row a sample.",
)
@option(
    "--scenarios",
    group=PROMPTS,
    type=PATH,
    metavar="FILE",
    help="File of scenarios that gives the tags.  [default: the metadata JSON's]",
)
@output_option("Folder of the run, or its address.", type=Address(), required=True)
@overwrite_option
@threads_option
@quiet_option
@storage_option
def command(
    source: Path,
    output: Location,
    layers: tuple[int, ...] | None,
    metadata: str | None,
    scenarios: Path | None,
    threads: int | None,
    overwrite: bool,  # noqa: FBT001 -- click passes flags so
    quiet: bool,  # noqa: FBT001
) -> None:
    """Turn SOURCE into a run: a folder in the documented layer_N.npz layout, or hidden states.

    Hidden states are hidden_states.npy, layer_N.npy, layer_N.safetensors or an NPZ file such as
    phase_a_hidden_states.npz; they become a table, with the residual stream of every row.

    The metadata JSON that 'zarrtrace export' writes also names tags, prompts and the model. One
    that another program wrote does not, and the run then has none.
    """
    from zarrtrace.imports import is_hidden
    from zarrtrace.npz import import_npz

    if is_hidden(source):
        if scenarios is not None:
            raise click.UsageError("Hidden states take --metadata, not --scenarios.")
        _import_hidden(
            source, output, layers, metadata, threads=threads, overwrite=overwrite, quiet=quiet
        )
        return
    with bar("import", quiet=quiet) as progress:
        import_npz(
            source,
            output,
            layers=layers,
            metadata=metadata,
            scenarios=scenarios,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    if not quiet:
        from zarrtrace.cli.info_ import as_text
        from zarrtrace.npz.plausibility import NOT_TOLD
        from zarrtrace.store import summarize

        summary = summarize(output)
        say(as_text(summary))
        for sentence in (*_lost(summary), NOT_TOLD):
            say(sentence, err=True)


def _import_hidden(
    source: Path,
    output: Location,
    layers: tuple[int, ...] | None,
    metadata: str | None,
    *,
    threads: int | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    from zarrtrace.imports import import_hidden

    with bar("import", quiet=quiet) as progress:
        left_out = import_hidden(
            source,
            output,
            layers=layers,
            metadata=metadata,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    if left_out:
        say(f"Left out, as they are not one value a sample: {', '.join(left_out)}.", err=True)
    if not quiet:
        from zarrtrace.store import open_table

        ds = open_table(output)
        shape = ", ".join(f"{size} {name}s" for name, size in ds["residual"].sizes.items())
        say(f"{output}: the residual stream of {shape}; {len(ds.attrs['failed'])} failed scenarios")


def _lost(summary: RunSummary) -> list[str]:
    """Say what the metadata JSON did not name."""
    lost = []
    if not any(trace.tags for trace in summary.traces):
        lost.append("The run has no tags: the metadata JSON names none. Give --scenarios FILE.")
    if not any(trace.model for trace in summary.traces):
        lost.append("The run names no model: only the JSON of 'zarrtrace export' does.")
    return lost
