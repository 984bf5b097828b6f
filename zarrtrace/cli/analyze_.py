"""``zarrtrace analyze``: one subcommand an analysis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from zarrtrace.cli.commands import QUESTION, Group, option
from zarrtrace.cli.feature_names import namer_of
from zarrtrace.cli.results import check_output, write_result
from zarrtrace.cli.rows import FeaturePair, choice_of, row_options
from zarrtrace.cli.shared import (
    PATH,
    computing,
    layers_option,
    output_option,
    quiet_option,
    run_argument,
    sae_option,
    say,
    scheduler_option,
    show_progress,
    special_option,
    threads_option,
    workers_option,
)
from zarrtrace.cli.tables import LAYOUTS, Layout, text_of
from zarrtrace.errors import ConfigError
from zarrtrace.suggestions import did_you_mean

if TYPE_CHECKING:
    import xarray as xr

    from zarrtrace.storage import Location

# Bytes of attention in a layer of 1,024 tokens and 32 heads; more is not read at once.
_LARGE_LAYER = 2**27


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
    "--seed", type=int, default=0, show_default=True, help="Of the random numbers drawn."
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
_FEATURES = _option(
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


_ANALYSES: dict[str, Analysis] = {
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
        (_FEATURES, _AT, sae_option),
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
        "What separates two groups of scenarios.",
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
                help="Leave out words that stand in the prompts less often.",
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
                help="Of means, or weights.  [default: by the column]",
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
        "What the model would say next: the probability of each option, and entropy.",
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
                help="Of the intervals.",
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


@click.group(
    "analyze",
    cls=Group,
    examples=[
        ("analyze attention-to runs/demo --source balance", ""),
        ("analyze contrast runs/demo --help", "Options of one analysis:"),
    ],
)
def command() -> None:
    """Answer a question from a run.

    Prints the answer in a sentence and its strongest rows, or writes all rows as CSV, Parquet,
    NetCDF or JSON by the ending of --output.
    """


def _add(name: str, analysis: Analysis) -> None:
    def run_analysis(**given: Any) -> None:
        _run(name, analysis.function, given)

    wrapped: Callable[..., Any] = run_analysis
    for decorator in reversed(
        (
            run_argument,
            *analysis.options,
            *row_options(LAYOUTS.get(name, Layout()), has_features=_FEATURES in analysis.options),
            output_option("File to write: .csv, .parquet, .nc or .json.", type=PATH),
            threads_option,
            workers_option,
            scheduler_option,
            quiet_option,
        )
    ):
        wrapped = decorator(wrapped)
    example = f"analyze {name} runs/demo {analysis.example}".rstrip()
    command.command(name, help=analysis.text, examples=[(example, "")])(wrapped)


for _name, _analysis in _ANALYSES.items():
    _add(_name, _analysis)


def _run(name: str, function: str, given: dict[str, Any]) -> None:
    from zarrtrace.analysis.findings import with_findings

    run, output, quiet = given.pop("run"), given.pop("output"), given.pop("quiet")
    where = {name: given.pop(name) for name in ("threads", "workers", "scheduler")}
    layout, choice = LAYOUTS.get(name, Layout()), choice_of(given)
    if output is not None:
        check_output(output, choice)
    with computing(**where, progress=show_progress(quiet=quiet)):
        data = _open(run, on_cluster=where["scheduler"] is not None)
        result = with_findings(_compute(function, data, given).compute())
        if function == "probe" and (output is None or output.suffix != ".nc"):
            result = result.drop_dims("sample")  # predictions: another table
    namer = namer_of(run, given.get("sae"))
    if output is None:
        say(text_of(result, layout, choice, namer))
    else:
        write_result(result, output, layout, choice, namer)


def _open(run: Location, *, on_cluster: bool, large_layer: int = _LARGE_LAYER) -> Any:
    """Open a run, a trace or a table; in dask's blocks only what needs them: they take time."""
    from zarrtrace.analysis.selecting import traces
    from zarrtrace.store import kind_of, open_run, open_table, open_trace

    kind = kind_of(run)
    if kind == "table":
        return open_table(run, chunks="auto" if on_cluster else None)
    reader = open_trace if kind == "trace" else open_run
    data = reader(run)
    attention = [ds["attention"][:1].nbytes for ds in traces(data).values() if "attention" in ds]
    if on_cluster or max(attention, default=0) > large_layer:
        return reader(run, chunks="auto")
    return data


def _compute(function: str, data: Any, given: dict[str, Any]) -> Any:
    """Call an analysis; what was not given is left to its defaults."""
    from zarrtrace import analysis

    arguments = {name: _plain(value) for name, value in given.items() if value not in (None, ())}
    if function == "contrast":
        arguments |= _groups(data, arguments)
    if "bands" in arguments:
        arguments["bands"] = dict(arguments["bands"])
    if "sae" in arguments:
        data = analysis.of_sae(data, arguments.pop("sae"))
    if function == "relate":
        chosen = arguments.pop("option")
        places = {name: arguments.pop(name) for name in ("source", "target")}
        if arguments.pop("chosen"):
            outcome = analysis.chose(data, chosen)
        else:
            outcome = _of_option(analysis.decision(data)["probability"], chosen)
        return analysis.relate(outcome, analysis.attention_to(data, **places), **arguments)
    if function == "crossreference" and "table" not in arguments:
        arguments["table"] = analysis.word_associations(data)
    return getattr(analysis, function)(data, **arguments)


def _of_option(probability: xr.DataArray, name: str) -> xr.DataArray:
    known = [str(one) for one in probability.indexes["option"]]
    if name not in known:
        raise ConfigError(
            f"--option {name}: no scenario has such an option",
            why="Options are named in the scenarios file.",
            remedy=did_you_mean(name, known),
        )
    return probability.sel(option=name)


def _groups(data: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the groups of a contrast: tags, or values of a column as the column has them."""
    from zarrtrace.analysis.selecting import metadata

    if "by" not in given:
        return {}
    column = metadata(data).get(given["by"])
    values = [] if column is None or column.dtype == object else column.tolist()
    known = {str(value).lower(): value for value in values}
    groups = {name: text for name, text in given.items() if name in ("group_a", "group_b")}
    for name, text in groups.items():
        # 90 is also a way to write 90.0.
        same = [text.lower(), f"{text}.0"]
        groups[name] = next((known[one] for one in same if one in known), text)
    return groups


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
