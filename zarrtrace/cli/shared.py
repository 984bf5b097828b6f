"""Options and output that several subcommands share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from zarrtrace.cli.commands import MACHINE, OBJECT_STORES, OUTPUT, PART, QUESTION, option
from zarrtrace.errors import NotATraceError
from zarrtrace.text import terminal_text

if TYPE_CHECKING:
    from zarrtrace.storage import Location
from zarrtrace.cli.option_types import Layers


class GivenPath(click.Path):
    """A path; an empty one, of a variable that is not set, is not taken for this folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an empty path."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


# Computations that are shorter have no bar: an analysis may consist of dozens.
_SECONDS_UNSEEN = 1

PATH = GivenPath(path_type=Path)


class Address(click.ParamType["Location"]):
    """A folder, or the address of one in an object store: ``s3://bucket/run``."""

    name = "PATH"

    def __init__(self, *, of_target: bool = False) -> None:
        self._of_target = of_target

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Location:
        """Find the place, with the storage options that were given; refuse an empty path."""
        from zarrtrace.storage import locate

        if value == "":
            self.fail("the path is empty", param, ctx)
        given = dict(ctx.meta.get("zarrtrace.storage_option", {})) if ctx else {}
        if ctx and self._of_target:
            given |= ctx.meta.get("zarrtrace.target_option", {})
        return locate(value, given)


def _keep_options(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
    """Keep storage options for :class:`Address`, which is converted later."""
    options = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name:
            # Not repeated: it may be a secret whose name was forgotten.
            raise click.BadParameter("give it as KEY=VALUE", ctx, param)
        options[name] = value
    ctx.meta[f"zarrtrace.{param.name}"] = options


def _options_of_store(name: str, text: str) -> Callable[..., Any]:
    return option(
        name,
        group=OBJECT_STORES,
        multiple=True,
        is_eager=True,
        expose_value=False,
        callback=_keep_options,
        metavar="KEY=VALUE",
        help=text,
    )


storage_option = _options_of_store("--storage-option", "As endpoint=http://host:9000. Repeatable.")
target_option = _options_of_store("--target-option", "The same, of TARGET alone.")


def run_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Have a command take a run, by its path or address."""
    taking: Callable[..., Any] = click.argument("run", type=Address())(storage_option(command))
    return taking


def refuse_table(run: Location, why: str, remedy: str) -> None:
    """Refuse a table, for a command that needs traces.

    Raises
    ------
    NotATraceError
    """
    from zarrtrace.store import kind_of

    if kind_of(run) == "table":
        raise NotATraceError(f"{run}: is a table, not a run of traces", why=why, remedy=remedy)


def say(text: str, *, err: bool = False) -> None:
    """Print text, of one or more lines, with nothing in it that a terminal would obey."""
    click.echo(terminal_text(text, lines=True), err=err)


def json_text(value: Any) -> str:
    """Write JSON in printable ASCII: what a terminal would obey is escaped as JSON escapes."""
    import json

    return json.dumps(value, indent=2).replace("\x7f", "\\u007f")


json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")
quiet_option = option("--quiet", "-q", is_flag=True, help="No progress, no summary.")
overwrite_option = option(
    "--overwrite",
    group=OUTPUT,
    is_flag=True,
    help="Replace what is there, once the new one is finished.",
)
scenario_option = option(
    "--scenario",
    "scenarios",
    group=PART,
    multiple=True,
    metavar="NAME",
    help="Only this scenario. Repeatable.",
)
layers_option = option(
    "--layers", group=PART, type=Layers(), help="Only these layers, as 1-31 or 1,5,20-31."
)
sae_option = option(
    "--sae",
    group=QUESTION,
    metavar="NAME",
    help="Features of another SAE: what stands behind 'features_'.",
)
special_option = option(
    "--special", group=QUESTION, is_flag=True, help="Count special tokens (BOS, chat markers), too."
)
threads_option = option(
    "--threads",
    group=MACHINE,
    type=click.IntRange(1),
    metavar="N",
    help="Threads of this process.  [default: one a core]",
)
workers_option = option(
    "--workers",
    group=MACHINE,
    type=click.IntRange(1),
    metavar="N",
    help="Start N processes on this machine.",
)
scheduler_option = option(
    "--scheduler",
    group=MACHINE,
    metavar="ADDRESS",
    help="Use the Dask cluster at this address, as tcp://host:8786.",
)


def output_option(of_what: str, **settings: Any) -> Callable[..., Any]:
    """Give a command ``--output``."""
    return option("--output", "-o", group=OUTPUT, help=of_what, **settings)


def show_progress(*, quiet: bool) -> bool:
    """Whether bars make sense: not asked to be quiet, and stderr is a terminal."""
    return not quiet and sys.stderr.isatty()


class ReportProgress(Protocol):
    """Function that is told how much is done."""

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """Draw how many of how many are done, and which was the last."""


@contextlib.contextmanager
def bar(description: str, *, quiet: bool, unit: str = "file") -> Iterator[ReportProgress]:
    """Yield a function that draws how many of how many files, or bytes, are done."""
    from tqdm import tqdm

    with tqdm(
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        disable=not show_progress(quiet=quiet),
    ) as drawn:

        def progress(done: int, total: int, what: str = "") -> None:
            drawn.total = total
            # Longer names leave no room for the bar itself at 80 columns.
            drawn.set_postfix_str(terminal_text(what)[:22], refresh=False)
            drawn.update(done - drawn.n)

        yield progress


@contextlib.contextmanager
def computing(
    *, threads: int | None, workers: int | None, scheduler: str | None, progress: bool
) -> Iterator[None]:
    """Have dask compute where it was asked to: in threads unless told otherwise."""
    from concurrent.futures import ProcessPoolExecutor

    import dask
    from dask.diagnostics import ProgressBar
    from dask.multiprocessing import get_context

    one_of({"--threads": threads, "--workers": workers, "--scheduler": scheduler})
    if scheduler is not None:
        with _cluster(scheduler):
            yield
        return
    bar = (
        ProgressBar(minimum=_SECONDS_UNSEEN, out=sys.stderr)
        if progress
        else contextlib.nullcontext()
    )
    # Tasks are large, and handed out one at a time: else one process gets six of eight.
    settings: dict[str, Any] = {"num_workers": workers or threads, "chunksize": 1}
    with contextlib.ExitStack() as stack:
        if workers is None:
            settings["scheduler"] = "threads"
        else:  # kept, for each imports all libraries
            settings["scheduler"] = "processes"
            settings["pool"] = stack.enter_context(ProcessPoolExecutor(workers, get_context()))
        stack.enter_context(dask.config.set(settings))
        stack.enter_context(bar)
        yield


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    try:
        from distributed import Client

        from zarrtrace.extraction.connecting import no_scheduler
    except ModuleNotFoundError as error:
        from zarrtrace.errors import missing_for_cluster

        raise missing_for_cluster(error) from error
    try:
        client = Client(address)
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        raise no_scheduler(error) from error
    with client:
        yield


def one_of(given: Mapping[str, Any]) -> None:
    """Refuse more than one of some options."""
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        *first, last = given
        raise click.UsageError(f"Give one of {', '.join(first)} and {last}, not several.")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns; numbers to the right. Each cell stays on its line."""
    rows = [[terminal_text(cell) for cell in row] for row in rows]
    lines = [list(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [all(_numeric(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _numeric(text: str) -> bool:
    return text.replace(".", "").replace("×", "").replace("-", "").split(" ")[0].isdigit()
