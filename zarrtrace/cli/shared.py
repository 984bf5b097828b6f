"""Options and output that several subcommands share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zarrtrace.text import terminal_text

if TYPE_CHECKING:
    from zarrtrace.storage import Location


class GivenPath(click.Path):
    """A path; an empty one, of a variable that is not set, is not taken for this folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an empty path."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


PATH = GivenPath(path_type=Path)


class Layers(click.ParamType[tuple[int, ...]]):
    """Indices of decoder blocks: ``1-31``, ``3``, ``1,5,20-31``."""

    name = "LAYERS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse a list of numbers and ranges."""
        if isinstance(value, tuple):
            return value
        layers: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            # Lengths first: Python refuses to read thousands of digits.
            if not _number(first) or (dash and not _number(last)):
                self.fail(f"{value!r} is not a list of layers like 1-31 or 1,5,20-31", param, ctx)
            start, stop = int(first), int(last or first)
            if stop < start or stop >= 10_000:
                self.fail(f"{part.strip()!r} is not a range of layers", param, ctx)
            layers += range(start, stop + 1)
        return tuple(sorted(set(layers)))


class Queries(click.ParamType[str | tuple[int, ...]]):
    """Rows of attention: ``last``, ``spans``, or token positions as ``0,5,-1``."""

    name = "QUERIES"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | tuple[int, ...]:
        """Parse a name or a list of positions."""
        if isinstance(value, tuple):
            return value
        if value in ("last", "spans"):
            return str(value)
        parts = [part.strip() for part in str(value).split(",")]
        if not all(_number(part.removeprefix("-")) for part in parts):
            self.fail(f"{value!r} is not 'last', 'spans' or positions like 0,5,-1", param, ctx)
        return tuple(map(int, parts))


def _number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


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
    made: Callable[..., Any] = click.option(
        name,
        multiple=True,
        is_eager=True,
        expose_value=False,
        callback=_keep_options,
        metavar="KEY=VALUE",
        help=text,
    )
    return made


storage_option = _options_of_store(
    "--storage-option", "Of an object store, as endpoint=http://host:9000; may be repeated."
)
target_option = _options_of_store("--target-option", "The same, of TARGET alone.")


def run_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Have a command take a run, by its path or address."""
    taking: Callable[..., Any] = click.argument("run", type=Address())(storage_option(command))
    return taking


def say(text: str, *, err: bool = False) -> None:
    """Print text, of one or more lines, with nothing in it that a terminal would obey."""
    click.echo(terminal_text(text, lines=True), err=err)


def json_text(value: Any) -> str:
    """Write JSON in printable ASCII: what a terminal would obey is escaped as JSON escapes."""
    import json

    return json.dumps(value, indent=2).replace("\x7f", "\\u007f")


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress bars, no summary.")
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace a run that exists, once the new one is finished."
)
scheduler_option = click.option(
    "--scheduler", default="threads", help="threads, processes or tcp://HOST:PORT"
)
workers_option = click.option("--workers", type=click.IntRange(1), help="Threads or processes.")


def show_progress(*, quiet: bool) -> bool:
    """Whether bars make sense: not asked to be quiet, and stderr is a terminal."""
    return not quiet and sys.stderr.isatty()


@contextlib.contextmanager
def bar(
    description: str, *, quiet: bool, unit: str = "file"
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that draws how many of how many files, or bytes, are done."""
    from tqdm import tqdm

    with tqdm(
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        disable=not show_progress(quiet=quiet),
    ) as drawn:

        def progress(done: int, total: int) -> None:
            drawn.total = total
            drawn.update(done - drawn.n)

        yield progress


@contextlib.contextmanager
def computing(scheduler: str, workers: int | None, *, progress: bool) -> Iterator[None]:
    """Have dask compute where it was asked to."""
    from concurrent.futures import ProcessPoolExecutor

    import dask
    from dask.diagnostics import ProgressBar
    from dask.multiprocessing import get_context

    if "://" in scheduler:
        try:
            from distributed import Client
        except ModuleNotFoundError as error:
            from zarrtrace.errors import missing_for_cluster

            raise missing_for_cluster(error) from error
        with Client(scheduler):
            yield
        return
    if scheduler not in ("threads", "processes", "synchronous"):
        raise click.UsageError(f"--scheduler {scheduler}: give threads, processes or an address.")
    bar = ProgressBar(out=sys.stderr) if progress else contextlib.nullcontext()
    # Tasks are large, and handed out one at a time: else one process gets six of eight.
    settings: dict[str, Any] = {"scheduler": scheduler, "num_workers": workers, "chunksize": 1}
    with contextlib.ExitStack() as stack:
        if scheduler == "processes":  # kept, for each imports all libraries
            pool = ProcessPoolExecutor(workers or os.cpu_count(), get_context())
            settings["pool"] = stack.enter_context(pool)
        stack.enter_context(dask.config.set(settings))
        stack.enter_context(bar)
        yield


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
