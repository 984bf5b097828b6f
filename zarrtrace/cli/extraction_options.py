"""Options of ``zarrtrace extract``, in the order in which help shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from zarrtrace.cli.commands import CONTENT, MACHINE, MODEL, OUTPUT, PROMPTS, option
from zarrtrace.cli.generation_options import generation_options
from zarrtrace.cli.option_types import Layers, PositionsType
from zarrtrace.cli.shared import (
    PATH,
    Address,
    json_option,
    output_option,
    overwrite_option,
    quiet_option,
    scheduler_option,
    storage_option,
    workers_option,
)

_OPTIONS = (
    option(
        "--prompt",
        "prompts",
        group=PROMPTS,
        multiple=True,
        metavar="TEXT",
        help="A prompt, word for word, named scenario_0, scenario_1, ... Repeatable.",
    ),
    option(
        "--scenarios",
        group=PROMPTS,
        type=PATH,
        metavar="FILE",
        help="YAML, JSONL, CSV or Parquet file of prompts, or a data set's folder; slot-machine "
        "names the embedded ten.",
    ),
    option(
        "--scenario",
        "only",
        group=PROMPTS,
        multiple=True,
        metavar="NAME",
        help="Only this scenario. Repeatable.",
    ),
    option(
        "--model",
        group=MODEL,
        metavar="NAME",
        help="Folder or Hugging Face id; demo names the embedded model.",
    ),
    option("--revision", group=MODEL, help="Commit, tag or branch of the model."),
    option(
        "--dtype",
        group=MODEL,
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="Precision of the model.  [default: the checkpoint's]",
    ),
    option(
        "--prepend-bos/--no-prepend-bos",
        group=MODEL,
        default=None,
        help="Whether prompts begin with BOS.  [default: as the SAEs were trained; of messages, as "
        "the chat template does]",
    ),
    option(
        "--generation-prompt/--no-generation-prompt",
        group=PROMPTS,
        default=True,
        help="Whether the chat template begins the assistant's next message, or a last message of "
        "the assistant's is continued.  [default: it does]",
    ),
    option(
        "--trust-remote-code", group=MODEL, is_flag=True, help="Run code that comes with the model."
    ),
    option(
        "--sae-release",
        group=MODEL,
        metavar="NAME",
        help="Release that sae-lens knows, as llama_scope_lxr_8x.",
    ),
    option(
        "--sae-id",
        "sae_ids",
        group=MODEL,
        multiple=True,
        metavar="ID",
        help="Id within the release, as 'l{layer}r_8x'. Repeatable, one feature array each.",
    ),
    option("--sae-path", group=MODEL, type=PATH, help="Folder of SAEs saved by sae-lens."),
    option(
        "--fold-decoder-norm", group=MODEL, is_flag=True, help="Scale features to decoder norm 1."
    ),
    option(
        "--sae-products",
        group=MODEL,
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="bfloat16: on a GPU's tensor cores, added up in float32.",
    ),
    generation_options,
    option(
        "--layers",
        group=CONTENT,
        type=Layers(),
        help="Decoder blocks, as 1-31 or 1,5,20-31.  [default: all, with SAEs those that have one]",
    ),
    option(
        "--layer-start", group=CONTENT, type=click.IntRange(0), help="First, instead of --layers."
    ),
    option("--layer-end", group=CONTENT, type=click.IntRange(0), help="Last, instead of --layers."),
    option(
        "--no-features", group=CONTENT, is_flag=True, help="Attention only; no SAEs are loaded."
    ),
    option("--no-attention", group=CONTENT, is_flag=True, help="Features only."),
    option(
        "--residual",
        group=CONTENT,
        is_flag=True,
        help="Store the residual stream, too, where the SAEs read it.  "
        "[without SAEs: blocks' output]",
    ),
    option(
        "--positions",
        group=CONTENT,
        type=PositionsType(),
        default="all",
        help="Tokens to store: all, last, spans, names of spans as goal,balance, or 0,5,-1.  "
        "[default: all]",
    ),
    option(
        "--attention-positions",
        group=CONTENT,
        type=PositionsType(),
        help="Rows of attention, likewise, among --positions.  [default: those]",
    ),
    option(
        "--layout",
        group=CONTENT,
        type=click.Choice(["traces", "table"]),
        default="traces",
        show_default=True,
        help="A trace a scenario, or one table of the stored positions of all; no attention.",
    ),
    option(
        "--attention-capture",
        group=CONTENT,
        type=click.Choice(["auto", "whole", "blocked"]),
        default="auto",
        help="Whole matrices, or blocks of queries.  [default: blocks where they are large]",
    ),
    option(
        "--attention-dtype",
        group=CONTENT,
        type=click.Choice(["float32", "float16"]),
        help="Precision of stored attention.  [default: lossless]",
    ),
    option(
        "--attention-keepbits",
        group=CONTENT,
        type=click.IntRange(1, 23),
        help="Bits of the mantissa of stored attention.  [default: all]",
    ),
    option(
        "--feature-dtype",
        group=CONTENT,
        type=click.Choice(["float32", "float16"]),
        default="float32",
        show_default=True,
        help="Precision of stored features; float16 ends at 65,504.",
    ),
    option(
        "--residual-dtype",
        group=CONTENT,
        type=click.Choice(["float32", "float16"]),
        default="float32",
        show_default=True,
        help="Precision of the stored residual stream.",
    ),
    option(
        "--allow-nonfinite",
        group=CONTENT,
        is_flag=True,
        help="Store NaN and infinity, and say where.",
    ),
    output_option("Folder of the run, or its address.", type=Address(), required=True),
    overwrite_option,
    option(
        "--repair",
        group=OUTPUT,
        is_flag=True,
        help="Read every byte that is there; redo what is damaged.",
    ),
    option(
        "--accept-versions",
        group=OUTPUT,
        is_flag=True,
        help="Resume a run that other versions of libraries began; its traces name both.",
    ),
    option("--device", group=MACHINE, metavar="NAME", help="As cpu or cuda:0.  [default: cpu]"),
    option(
        "--gpu", group=MACHINE, type=click.IntRange(0), help="Number of a GPU, instead of --device."
    ),
    option(
        "--low-memory",
        group=MACHINE,
        is_flag=True,
        help="Keep one decoder block at a time on the GPU.",
    ),
    option(
        "--batch-size",
        group=MACHINE,
        type=click.IntRange(1),
        help="Scenarios a forward pass.  [default: as many as fit; 1 on a CPU]",
    ),
    workers_option,
    scheduler_option,
    option(
        "--scheduler-file",
        group=MACHINE,
        type=PATH,
        metavar="FILE",
        help="File in which the cluster's scheduler wrote its address.",
    ),
    option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
    json_option,
    quiet_option,
    storage_option,
)


def extraction_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options, in their order."""
    for one in reversed(_OPTIONS):
        command = one(command)
    return command
