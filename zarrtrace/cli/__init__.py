"""The command ``zarrtrace``: each subcommand parses, calls and prints, and lives in its own module.

Nothing but click is imported until a subcommand runs.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import os
import re
import signal
import sys
import warnings
from types import TracebackType
from typing import TextIO

import click

from zarrtrace.cli.commands import Group, option
from zarrtrace.cli.shared import say
from zarrtrace.text import without_secrets

# Help of each subcommand beside its name: listing them must not import them.
_COMMANDS = {
    "extract": "Run a model over scenarios and store attention and SAE features.",
    "info": "Show what a run holds, and whether it is complete.",
    "verify": "Read every byte of a run and compare it with its checksums.",
    "export": "Write a run as the documented layer_N.npz files.",
    "import": "Turn layer_N.npz files into a run, or hidden states into a table.",
    "analyze": "Answer a question from a run: attention, features, groups, the decision.",
    "index": "Index a run's features: their strongest tokens over all scenarios.",
    "find": "Say which prompts drive a feature, from a run's index.",
    "labels": "Store labels of features with a run, as from Neuronpedia.",
    "figures": "Draw a run's figures, with a page that shows them.",
    "view": "Look at a run in the browser.",
    "bundle": "Write a run with its viewer, for any web host or as one HTML file.",
    "copy": "Copy a run between disks and object stores, verified by checksum.",
    "card": "Make a run a Hugging Face dataset folder.",
    "tutorial": "Copy two notebooks to learn from, which run without a download.",
}

# How the dynamic linker, PyTorch and threading say it, in errors of other types than MemoryError.
_NO_MEMORY = re.compile(
    r"failed to map segment|can(?:no|')t allocate memory|can't start new thread", re.IGNORECASE
)


class _Commands(Group):
    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"zarrtrace.cli.{cmd_name}_").command
        return command

    def command_texts(self, _ctx: click.Context) -> list[tuple[str, str]]:
        return list(_COMMANDS.items())


def _version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:  # noqa: FBT001
    if wanted:
        import importlib.metadata

        say(f"zarrtrace {importlib.metadata.version('zarrtrace')}")
        ctx.exit()


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    examples=[
        ("extract -o runs/demo", "A small model that ships with zarrtrace, over ten prompts:"),
        ("view runs/demo", "Look at it:"),
        ("extract --help", "Options of a command:"),
    ],
)
@option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
    help="Show the version and exit.",
)  # fmt: skip
def group() -> None:
    """Attention and SAE features of every layer and token, as labelled Zarr stores.

    Exit codes: 0 ok, 1 failure, 2 usage, 3 partial (scenarios or layers missing), 130 interrupted,
    143 terminated.
    """


def main() -> None:
    """Run the command line; the console script's entry point."""
    from zarrtrace.cli.interruption import interruptible

    # Else pydantic reads the metadata of every package there is, a tenth of a second before the
    # first line of an extraction.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    # At its end Python looks through everything for garbage, a second after an extraction.
    atexit.register(gc.freeze)
    sys.excepthook = _show_traceback
    warnings.showwarning = _show_warning
    with interruptible() as signals:
        code = _run(signals)
    sys.exit(code)


def _show_traceback(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print the traceback of an error that nobody expected, which may quote what was read."""
    from traceback import format_exception

    say(without_secrets("".join(format_exception(kind, error, traceback))).rstrip(), err=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning without the line of code that it came from."""
    del category, filename, lineno, file, line
    say(f"zarrtrace: warning: {without_secrets(str(message))}", err=True)


def _run(signals: list[int]) -> int:
    """Run a subcommand; return the exit code. `signals` are those that came meanwhile."""
    from zarrtrace.errors import ZarrtraceError

    try:
        code = group(prog_name="zarrtrace", standalone_mode=False)
    except click.ClickException as error:
        shown = io.StringIO()  # it quotes arguments
        error.show(shown)
        say(without_secrets(shown.getvalue()).rstrip(), err=True)
        return error.exit_code
    except ZarrtraceError as error:
        say(f"zarrtrace: error: {error}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        number = signals[0] if signals else signal.SIGINT
        say(f"zarrtrace: stopped by {signal.Signals(number).name}", err=True)
        return 128 + number
    except BrokenPipeError:
        # The reader of our output has stopped; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError, ImportError, RuntimeError) as error:
        said = _refused(error)
        if said is None:
            raise
        say(f"zarrtrace: error: {said}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def _refused(error: Exception) -> str | None:
    """Say what the system refused, None if it refused nothing.

    Refusals of stores and NPZ files say more themselves.
    """
    import errno

    no_memory = isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))
    if no_memory or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return (
            "the system gives this command no more memory\n"
            "A limit for it was reached ('ulimit -v', a container's or a job's), or all of the "
            "machine's memory is taken.\n"
            "Raise the limit, or free memory, and run the same command again."
        )
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    what = f"{where}{error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}\nMake room and run the same command again, or write elsewhere."
    return (
        f"{what}\nThe system refused to read or write there.\n"
        "Check that the folder exists, that you may write to it, and that no file is in its way."
    )
