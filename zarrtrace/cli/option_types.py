"""Types of options: layers, positions, places, bands, features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from zarrtrace.errors import ConfigError

if TYPE_CHECKING:
    from zarrtrace.scenarios.positions import Positions


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


class PositionsType(click.ParamType["Positions"]):
    """``all``, ``last``, ``spans``, names of spans with commas, or positions as ``0,5,-1``."""

    name = "POSITIONS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Positions:
        """Parse a word or a list."""
        from zarrtrace.scenarios.positions import parse_positions

        try:
            return parse_positions(value, "--positions")
        except ConfigError as error:
            self.fail(f"{value!r}: {error.remedy}", param, ctx)


def _number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


class FeaturePair(click.ParamType["tuple[int, int] | int"]):
    """A feature of a layer, as ``25:250``; a number alone is left for the command to judge."""

    name = "L:F"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int] | int:
        """Parse one number, or two with a colon."""
        if isinstance(value, tuple | int):
            return value
        numbers = str(value).split(":")
        if len(numbers) > 2 or not all(one.isdecimal() and len(one) < 10 for one in numbers):
            self.fail(f"{value!r} is not a layer and a feature, as 25:250", param, ctx)
        first = int(numbers[0])
        return (first, int(numbers[1])) if len(numbers) > 1 else first


class Place(click.ParamType[str | int]):
    """A span's name or a token position."""

    name = "PLACE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | int:
        """Parse a number as one."""
        del param, ctx
        text = str(value)
        return int(text) if text.removeprefix("-").isdecimal() else text


class Band(click.ParamType[tuple[str, tuple[int, int]]]):
    """A band of layers: its name, first and last layer."""

    name = "NAME=FIRST-LAST"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, int]]:
        """Parse ``local=1-10``."""
        if isinstance(value, tuple):
            return value
        band, _, layers = str(value).partition("=")
        first, _, last = layers.partition("-")
        if not (band and first.isdecimal() and last.isdecimal()):
            self.fail(f"{value!r} is no band of layers such as local=1-10.", param, ctx)
        return band, (int(first), int(last))
