"""The analyses of the command line: their functions, help and options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import click

from zarrtrace.cli.commands import QUESTION, option
from zarrtrace.cli.option_types import Band, FeaturePair, Place
from zarrtrace.cli.shared import PATH, layers_option, sae_option, special_option


def _option(*names: str, **settings: Any) -> Callable[..., Any]:
    return option(*names, group=QUESTION, **settings)


_SOURCES = _option(
    "--source", type=Place(), multiple=True, help="Span or token position. Repeatable."
)
_SOURCE = _option("--source", type=Place(), required=True, help="Span or token position.")
_TARGET = _option(
    "--target",
    type=Place(),
    default="decision",
    show_default=True,
    help="Span or token position that attends.",
)
_AT = _option("--at", type=Place(), multiple=True, help="Span or token position. Repeatable.")
_SPANS = _option("--span", "spans", multiple=True, metavar="NAME", help="Only this. Repeatable.")
_HEADS = _option(
    "--heads",
    type=click.Choice(["mean", "each"]),
    default="mean",
    show_default=True,
    help="Their mean, or each by itself.",
)
_KEEP = _option(
    "--keep",
    "top",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Strongest ones to keep of each layer, or words of each feature.",
)
_SEED = _option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the random numbers."
)
_PERMUTATIONS = _option(
    "--permutations",
    "n_permutations",
    type=click.IntRange(1),
    default=9999,
    show_default=True,
    help="Permutations to draw.",
)
_COLUMN = _option(
    "--column",
    "target",
    required=True,
    metavar="COLUMN",
    help="Column of metadata: a number, or one of two values.",
)
_ARRAY = _option(
    "--what",
    type=click.Choice(["residual", "features"]),
    default="residual",
    show_default=True,
    help="To read it from.",
)
_GROUPS = _option(
    "--groups",
    metavar="COLUMN",
    help="Samples of one value stay together.  [default: scenario]",
)
FEATURES = _option(
    "--feature",
    "features",
    type=FeaturePair(),
    multiple=True,
    required=True,
    help="Layer and feature, as 25:250. Repeatable.",
)
_WINDOW = _option(
    "--window",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Tokens that count as nearby.",
)
_DECIDED_AT = _option(
    "--at",
    metavar="SPAN",
    default="decision",
    show_default=True,
    help="The prompt's last token; of another span, as answer, the token before it.",
)


class Analysis(NamedTuple):
    """One analysis: function, help, what follows RUN in the example, and options."""

    function: str
    text: str
    example: str = ""
    options: tuple[Callable[..., Any], ...] = ()


ANALYSES: dict[str, Analysis] = {
    "attention-to": Analysis(
        "attention_to",
        "Attention from one place to others, by layer.",
        "--source balance --source goal -o attention.csv",
        (
            _SOURCES,
            _TARGET,
            _HEADS,
            _option(
                "--reduce",
                type=click.Choice(["mean", "sum"]),
                default="mean",
                show_default=True,
                help="Over the tokens of a span.",
            ),
        ),
    ),
    "feature-trajectory": Analysis(
        "feature_trajectory",
        "Activation of single features at a place.",
        "--feature 25:250 --feature 14:7 --at balance",
        (FEATURES, _AT, sae_option),
    ),
    "pathway-features": Analysis(
        "pathway_features",
        "Features active at a span and at the decision, by activation × attention.",
        "--source balance",
        (_SOURCE, _TARGET, _KEEP, sae_option),
    ),
    "attention-locality": Analysis(
        "attention_locality",
        "Distance, entropy, share nearby and on the first token.",
        "",
        (
            _HEADS,
            _WINDOW,
            _option("--exclude-first", is_flag=True, help="Leave out attention to token 0."),
        ),
    ),
    "layer-bands": Analysis(
        "layer_bands",
        "Test that attention is local, then about the task, then about the decision.",
        "--band local=1-10 --band task=11-20 --band decision=21-31",
        (
            _option(
                "--band",
                "bands",
                type=Band(),
                multiple=True,
                help="First and last layer of 'local', 'task' and 'decision'. Repeatable.  "
                "[default: of the suite file]",
            ),
            _option(
                "--task-span",
                "task_spans",
                multiple=True,
                metavar="NAME",
                help="States the task. Repeatable.  [default: of the suite file, else all]",
            ),
            _WINDOW,
            _option(
                "--resamples",
                type=click.IntRange(99),
                default=9999,
                show_default=True,
                help="Bootstrap samples to draw.",
            ),
            _SEED,
        ),
    ),
    "critical-layers": Analysis(
        "critical_layers",
        "Layers whose attention to a span stands out among other groups of tokens.",
        "--span balance",
        (
            _SPANS,
            _TARGET,
            _option(
                "--draws",
                type=click.IntRange(2000),
                default=9999,
                show_default=True,
                help="Placebos to draw, if there are more.",
            ),
            _SEED,
        ),
    ),
    "attention-rollout": Analysis(
        "attention_rollout",
        "Attention rollout from spans to the decision.",
        "--source balance",
        (_SOURCES, _TARGET),
    ),
    "attention-flow": Analysis(
        "attention_flow",
        "Maximum flow of attention from spans to the decision.",
        "--source balance",
        (_SOURCES, _TARGET),
    ),
    "contrast": Analysis(
        "contrast",
        "Differences between two groups of scenarios.",
        "--group-a risky --group-b safe",
        (
            _option("--group-a", metavar="TAG", help="Tag, or value of --by."),
            _option("--group-b", metavar="TAG", help="May be left out if the run has two tags."),
            _option(
                "--by",
                metavar="COLUMN",
                help="Column of metadata; groups may be left out if it has 2 values.",
            ),
            _option(
                "--block",
                metavar="COLUMN",
                help="Column of metadata, such as the template: blocks are exchanged whole.",
            ),
            _AT,
            _option(
                "--what",
                type=click.Choice(["features", "attention"]),
                default="features",
                show_default=True,
                help="To compare.",
            ),
            _TARGET,
            _HEADS,
            sae_option,
            _PERMUTATIONS,
            _SEED,
        ),
    ),
    "position-specific-features": Analysis(
        "position_specific_features",
        "Features that fire at one kind of span and not elsewhere.",
        "--span balance",
        (
            _SPANS,
            _KEEP,
            _option(
                "--threshold",
                type=float,
                default=0.0,
                show_default=True,
                help="A feature fires above this activation.",
            ),
            sae_option,
        ),
    ),
    "word-associations": Analysis(
        "word_associations",
        "Tokens that activate each feature most.",
        "--strip -o words.csv",
        (
            _KEEP,
            _option(
                "--min-count",
                type=click.IntRange(1),
                default=1,
                show_default=True,
                help="Leave out words at which the feature fires less often.",
            ),
            _option("--strip", is_flag=True, help="Take ' bet' and 'bet' for one word."),
            _option(
                "--text",
                type=click.Choice(["all", "prompt", "generated"]),
                default="all",
                show_default=True,
                help="Count all tokens, those of prompts, or generated ones.",
            ),
            special_option,
            sae_option,
        ),
    ),
    "crossreference": Analysis(
        "crossreference",
        "Do features that go with a word fire where attention goes to it?",
        "",
        (
            _option(
                "--table",
                type=PATH,
                help="CSV or Parquet with layer, feature, word, score.  [default: own words]",
            ),
            _option(
                "--block",
                metavar="COLUMN",
                help="Metadata, as the template: scenarios that share it are moved together; "
                "'scenario' for independent prompts.  [default: all together]",
            ),
            special_option,
            sae_option,
            _SEED,
        ),
    ),
    "probe": Analysis(
        "probe",
        "How well a linear probe of each layer predicts a column on held-out groups.",
        "--column balance --what features",
        (
            _COLUMN,
            _ARRAY,
            _AT,
            _GROUPS,
            _option(
                "--confound",
                "confounds",
                multiple=True,
                metavar="COLUMN",
                help="Column that may predict it anyway. Repeatable.",
            ),
            _option(
                "--folds",
                type=click.IntRange(2),
                default=5,
                show_default=True,
                help="Parts that are held out in turn.",
            ),
            _option(
                "--permutations",
                "n_permutations",
                type=click.IntRange(0),
                default=999,
                show_default=True,
                help="Permutations to draw; 0 for no p.",
            ),
            _SEED,
            layers_option,
            sae_option,
        ),
    ),
    "directions": Analysis(
        "directions",
        "A direction a layer along which a column changes, as an array.",
        "--column balance --what features -o balance.nc",
        (
            _COLUMN,
            _ARRAY,
            _AT,
            _GROUPS,
            _option(
                "--method",
                type=click.Choice(["difference", "ridge"]),
                help="Difference of means, or ridge weights.  [default: by the column]",
            ),
            layers_option,
            sae_option,
        ),
    ),
    "head-roles": Analysis(
        "head_roles", "Previous-token, first-token, duplicate-token and induction scores of heads."
    ),
    "decision": Analysis(
        "decision",
        "The model's next token: the probability of each option, and entropy.",
        "-o decisions.csv",
        (_DECIDED_AT,),
    ),
    "choices": Analysis(
        "choices",
        "Options that generated texts chose, counted, beside their probabilities.",
        "-o choices.csv",
        (
            _DECIDED_AT,
            _option(
                "--confidence",
                type=click.FloatRange(0, 1, min_open=True, max_open=True),
                default=0.95,
                show_default=True,
                help="Level of the intervals.",
            ),
        ),
    ),
    "relate": Analysis(
        "relate",
        "How attention to a span goes with an option's probability over scenarios.",
        "--option bet --source balance",
        (
            _option("--option", required=True, metavar="NAME", help="Name of an option, as bet."),
            _option(
                "--chosen", is_flag=True, help="Whether generated texts chose it, not how likely."
            ),
            _SOURCE,
            _TARGET,
            _PERMUTATIONS,
            _SEED,
        ),
    ),
}
