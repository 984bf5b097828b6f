"""Commands whose help has headings and examples, and options that know their heading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

# Headings of help. Options of one meaning stand under the same heading in every command.
PROMPTS = "What to run"
PART = "Which part of the run"
MODEL = "Which model and SAEs"
CONTENT = "What to store"
GENERATION = "What the model goes on to say"
QUESTION = "What to compute"
OUTPUT = "Where to write"
MACHINE = "Where to run"
OTHER = "Options"
OBJECT_STORES = "Object stores"


class Option(click.Option):
    """An option under a heading.

    Parameters
    ----------
    group
        The heading.
    """

    def __init__(self, *args: Any, group: str = OTHER, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group
        if self.metavar is None and isinstance(self.type, click.types.IntParamType):
            self.metavar = "N"
        if self.metavar is None and isinstance(self.type, click.types.FloatParamType):
            self.metavar = "X"

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Leave out that a number is 0 or 1 at least, which goes without saying."""
        extra = super().get_help_extra(ctx)
        if getattr(self.type, "max", None) is None:
            extra.pop("range", None)
        return extra


def option(*names: str, group: str = OTHER, **settings: Any) -> Callable[..., Any]:
    """Give a command an :class:`Option`."""
    decorator: Callable[..., Any] = click.option(*names, cls=Option, group=group, **settings)
    return decorator


class Command(click.Command):
    """A command with headings and examples in its help.

    Parameters
    ----------
    examples
        Command lines without the name of the program, each with what it does, or "".
    """

    def __init__(
        self, *args: Any, examples: Sequence[tuple[str, str]] = (), **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.examples = tuple(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write options by heading: object stores, which few need, last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", OTHER), []).append(record)
        for last in (OTHER, OBJECT_STORES):
            if last in groups:
                groups[last] = groups.pop(last)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        super().format_epilog(ctx, formatter)
        write_examples(self.examples, formatter)


class Group(click.Group):
    """Commands that belong together: a misspelt one is recognised, examples end the help.

    Parameters
    ----------
    examples
        As for :class:`Command`.
    """

    command_class = Command

    def __init__(
        self, *args: Any, examples: Sequence[tuple[str, str]] = (), **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.examples = tuple(examples)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that was named, or suggest one that exists."""
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            from zarrtrace.suggestions import closest

            close = closest(args[0], known)
            hint = f" Did you mean {close!r}?" if close else ""
            if not close and Path(args[0]).exists():
                hint = f" It is a path; give a command before it, as {known[0]}."
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what each command does, uncut."""
        with formatter.section("Commands"):
            formatter.write_dl(self.command_texts(ctx))

    def command_texts(self, ctx: click.Context) -> list[tuple[str, str]]:
        """Return each command and what it does."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        return [(name, one.help or "") for name, one in found if one is not None]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        super().format_epilog(ctx, formatter)
        write_examples(self.examples, formatter)


# Columns of a terminal that an example may take.
_WIDTH = 76


def write_examples(examples: Sequence[tuple[str, str]], formatter: click.HelpFormatter) -> None:
    """Write command lines, each under the sentence that says what it does."""
    if not examples:
        return
    with formatter.section("Examples" if len(examples) > 1 else "Example"):
        for line, meaning in examples:
            if meaning:
                formatter.write_text(f"# {meaning}")
            indent = " " * formatter.current_indent
            shown = [f"$ zarrtrace {line}"]
            while len(shown[-1]) > _WIDTH and " -" in shown[-1][4:_WIDTH]:
                at = shown[-1].rindex(" -", 4, _WIDTH)  # not within a quoted value
                shown[-1:] = [shown[-1][:at], f"    {shown[-1][at + 1 :]}"]
            formatter.write(indent + f" \\\n{indent}".join(shown) + "\n")
