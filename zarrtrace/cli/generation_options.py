"""Options of what the model goes on to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from zarrtrace.cli.commands import GENERATION, option

#: Names of options that say how a continuation is sampled.
SAMPLING = ("temperature", "top_p", "samples", "seed", "stop")

_OPTIONS = (
    option(
        "--generate",
        group=GENERATION,
        type=click.IntRange(1),
        metavar="N",
        help="Let the model go on for at most N tokens, and store these like the prompt's.",
    ),
    option(
        "--temperature",
        group=GENERATION,
        type=click.FloatRange(0),
        default=0.0,
        help="Temperature of sampling.  [default: 0, the most likely token]",
    ),
    option(
        "--top-p",
        group=GENERATION,
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        help="Sample from the most likely tokens of this share.  [default: 1, all]",
    ),
    option(
        "--samples",
        group=GENERATION,
        type=click.IntRange(1),
        default=1,
        metavar="K",
        help="Continuations of each prompt: traces NAME~0, NAME~1, ...  [default: 1]",
    ),
    option(
        "--seed",
        group=GENERATION,
        type=int,
        default=0,
        help="Seed of sampling; other texts for another one.  [default: 0]",
    ),
    option(
        "--stop",
        group=GENERATION,
        multiple=True,
        metavar="TEXT",
        help="End a continuation in which this appears. Repeatable.",
    ),
    option(
        "--answer",
        group=GENERATION,
        metavar="REGEX",
        help="Pattern of the answer in a continuation: its first group, or all.  [default: the "
        "first of the options]",
    ),
)


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options, in their order."""
    for one in reversed(_OPTIONS):
        command = one(command)
    return command
