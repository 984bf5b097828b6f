"""``zarrtrace find``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from zarrtrace.cli.commands import QUESTION, Command, option
from zarrtrace.cli.option_types import FeaturePair, Layers
from zarrtrace.cli.shared import (
    json_option,
    json_text,
    run_argument,
    sae_option,
    say,
    special_option,
    table,
)

if TYPE_CHECKING:
    from zarrtrace.index import FeatureUse
    from zarrtrace.storage import Location


@click.command(
    "find",
    cls=Command,
    examples=[
        ("find runs/demo --feature 20:250 --top 3", ""),
        ("find runs/demo --label money", "Features whose label speaks of money:"),
    ],
)
@run_argument
@option(
    "--feature",
    group=QUESTION,
    type=FeaturePair(),
    help="Layer and index, as 20:250, or an index beside --layer.",
)
@option(
    "--label", group=QUESTION, metavar="TEXT", help="List features whose label has these words."
)
@option("--layer", "layers", group=QUESTION, type=Layers(), help="Index of the block.")
@option(
    "--top",
    group=QUESTION,
    type=click.IntRange(1, 20),
    default=20,
    show_default=True,
    help="Tokens to list, or features with --label.",
)
@option(
    "--text",
    group=QUESTION,
    type=click.Choice(["all", "prompt", "generated"]),
    default="all",
    show_default=True,
    help="List tokens of prompts, or generated ones, only.",
)
@sae_option
@special_option
@json_option
def command(
    run: Location,
    feature: tuple[int, int] | int | None,
    layers: tuple[int, ...] | None,
    label: str | None,
    top: int,
    text: Literal["all", "prompt", "generated"],
    sae: str | None,
    special: bool,  # noqa: FBT001 -- click passes flags so
    as_json: bool,  # noqa: FBT001
) -> None:
    """Say which prompts of RUN drive a feature: its strongest tokens over all scenarios.

    Needs the index that 'zarrtrace index' makes; a table can do without. Special tokens (BOS, chat
    markers) are left out unless asked for. With --label TEXT: list the features whose label, of
    'zarrtrace labels', has these words.
    """
    if label is not None:
        if feature is not None:
            raise click.UsageError("Give one of --feature and --label, not both.")
        _search(run, label, layers, sae, top, as_json=as_json)
        return
    if feature is None:
        raise click.UsageError("Give --feature LAYER:INDEX, as 20:250, or --label TEXT.")
    from zarrtrace.index import find_feature

    array = f"features_{sae}" if sae else "features"
    layer, number = _pair(feature, layers)
    found = find_feature(run, layer, number, top=top, array=array, text=text, special=special)
    if as_json:
        import dataclasses

        say(json_text(dataclasses.asdict(found)))
    else:
        say(_text(found, text, top, is_asked=special))


def _pair(feature: tuple[int, int] | int, layers: tuple[int, ...] | None) -> tuple[int, int]:
    """Return layer and index of the feature that is asked for."""
    if isinstance(feature, tuple) and layers in (None, (feature[0],)):
        return feature
    if isinstance(feature, int) and layers is not None and len(layers) == 1:
        return layers[0], feature
    number = feature[1] if isinstance(feature, tuple) else feature
    raise click.UsageError(
        f"--feature {number}: of which layer? The same number is another feature in each layer. "
        f"Give both, as --feature 20:{number}."
    )


def _search(
    run: Location,
    text: str,
    layers: tuple[int, ...] | None,
    sae: str | None,
    top: int,
    *,
    as_json: bool,
) -> None:
    """Print features by the words of their labels."""
    from zarrtrace.index import read_labels
    from zarrtrace.store import read_run_or_table

    read_run_or_table(run)  # says what is wrong if it is neither
    if read_labels(run).empty:
        raise click.UsageError(
            f"{run} has no labels. 'zarrtrace labels {run} FILE' stores some, as Neuronpedia's."
        )
    found = read_labels(
        run,
        layers=layers,
        array=f"features_{sae}" if sae else None,
        text=text,
    )
    shown = found.head(top)
    if as_json:
        say(json_text(shown.to_dict("records")))
        return
    if set(shown["array"]) <= {"features"}:
        shown = shown.drop(columns="array")
    rows = [[str(cell) for cell in row] for row in shown.itertuples(index=False)]
    lines = [table([*shown], rows)] if rows else [f"no label has {text!r}"]
    if len(found) > top:
        lines.append(f"... {len(found) - top:,} more")
    say("\n".join(lines))


def _text(found: FeatureUse, text: str, top: int, *, is_asked: bool) -> str:
    known = f"maximum {found.maximum:.4g}, mean {found.mean:.4g}"
    fires = f"fires at {found.frequency:.2%} of tokens"
    lines = [f"feature {found.feature} of layer {found.layer}: {known}, {fires}"]
    if found.label:
        lines.insert(0, found.label)
    if found.special and not is_asked:
        lines.append(
            "these numbers count special tokens, which the list leaves out: the index was built "
            "with them; 'zarrtrace index' builds one without"
        )
    if found.indexed < found.scenarios:
        lines.append(
            f"{found.indexed} of {found.scenarios} scenarios are indexed: the others were not "
            "complete, or failed; 'zarrtrace index' adds those that were completed since"
        )
    if text != "all" and len(found.tokens) < top:
        said = "generated" if text == "generated" else "of a prompt"
        lines.append(f"{len(found.tokens)} of its strongest tokens are {said}; an index holds 20")
    if not found.tokens:
        return "\n".join(lines)
    marks = ["generated" if one.generated else "" for one in found.tokens]
    rows = [
        [
            f"{one.activation:.4f}",
            one.scenario,
            str(one.position),
            *([mark] if any(marks) else []),
            f"{one.before}»{one.token}«{one.after}",
        ]
        for one, mark in zip(found.tokens, marks, strict=True)
    ]
    written = [""] if any(marks) else []
    header = ["activation", "scenario", "position", *written, "»token« in context"]
    return "\n".join([*lines, "", table(header, rows)])
