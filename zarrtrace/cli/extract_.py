"""``zarrtrace extract``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from zarrtrace.cli.shared import (
    PATH,
    Address,
    Layers,
    Queries,
    json_option,
    json_text,
    overwrite_option,
    quiet_option,
    say,
    show_progress,
    storage_option,
    table,
)
from zarrtrace.errors import missing_for_cluster, readable

if TYPE_CHECKING:
    from zarrtrace.extraction import Estimate, Job, Options
    from zarrtrace.storage import Location

_CLUSTER = ("workers", "scheduler", "scheduler_file")


@click.command("extract")
@click.option(
    "--output", "-o", type=Address(), required=True, help="Folder of the run, or its address."
)
@storage_option
@click.option("--model", help="Folder or Hugging Face id; the embedded model if left out.")
@click.option("--revision", help="Commit, tag or branch of the model.")
@click.option("--sae-release", help="Release that sae-lens knows, as llama_scope_lxr_8x.")
@click.option(
    "--sae-id",
    multiple=True,
    help="Ids within the release, as 'l{layer}r_8x'; repeated, one feature array each.",
)
@click.option("--sae-path", type=PATH, help="Folder of SAEs saved by sae-lens.")
@click.option("--fold-decoder-norm", is_flag=True, help="Scale features to decoder norm 1.")
@click.option(
    "--layers",
    type=Layers(),
    help="Decoder blocks, from 0.  [default: all, with SAEs those that have one]",
)
@click.option("--layer-start", type=click.IntRange(0), help="First, instead of --layers.")
@click.option("--layer-end", type=click.IntRange(0), help="Last, instead of --layers.")
@click.option("--no-features", is_flag=True, help="Attention only; no SAEs are loaded.")
@click.option("--no-attention", is_flag=True, help="Features only.")
@click.option("--scenarios", type=PATH, help="YAML or JSONL file; the ten embedded if left out.")
@click.option("--scenario", multiple=True, help="Only this scenario; may be repeated.")
@click.option("--device", help="As cpu or cuda:0.  [default: cpu]")
@click.option("--gpu", type=click.IntRange(0), help="Number of a GPU, instead of --device.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Precision of the model; auto is the checkpoint's.",
)
@click.option("--low-memory", is_flag=True, help="Keep one decoder block at a time on the GPU.")
@click.option("--batch-size", type=click.IntRange(1), help="Scenarios a forward pass.")
@click.option(
    "--queries",
    type=Queries(),
    help="Rows of attention to store: last, spans, or positions as 0,5,-1.  [default: all]",
)
@click.option(
    "--attention-capture",
    type=click.Choice(["auto", "whole", "blocked"]),
    default="auto",
    help="Whole matrices, or blocks of queries where they are large.",
)
@click.option(
    "--attention-dtype",
    type=click.Choice(["float32", "float16"]),
    help="Stored precision; lossless if left out.",
)
@click.option(
    "--attention-keepbits",
    type=click.IntRange(1, 23),
    help="Round stored attention to so many bits; lossless if left out.",
)
@click.option(
    "--feature-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    help="Stored precision of features; float16 ends at 65,504.",
)
@click.option("--prepend-bos/--no-prepend-bos", default=None, help="Override the SAEs' rule.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@overwrite_option
@click.option("--repair", is_flag=True, help="Read every byte that is there; redo what is damaged.")
@click.option("--allow-nonfinite", is_flag=True, help="Store NaN and infinity, and say where.")
@click.option(
    "--accept-versions",
    is_flag=True,
    help="Go on with a run that other versions of libraries began; its traces name both.",
)
@click.option("--workers", type=click.IntRange(1), help="Start so many processes, one a GPU.")
@click.option("--scheduler", help="Use the Dask cluster at this address, as tcp://host:8786.")
@click.option("--scheduler-file", type=PATH, help="File in which its scheduler wrote the address.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@json_option
@quiet_option
def command(**given: Any) -> None:
    """Run a model over scenarios and store attention and SAE features.

    One labelled Zarr store a scenario, in the folder --output or in an object store (s3://, gs://,
    az://). A run that was interrupted is gone
    on with by the same command.
    """
    from zarrtrace.extraction import estimate, prepare

    if given["overwrite"] and given["repair"]:
        raise click.UsageError("Give either --overwrite or --repair.")
    if sum(given[name] is not None for name in _CLUSTER) > 1:
        raise click.UsageError("Give one of --workers, --scheduler and --scheduler-file.")
    options = _options(given)
    if given["dry_run"]:
        job = prepare(options, weights=False)
        say(_plan(job, estimate(job), given["output"], as_json=given["as_json"]))
        return
    quiet = given["quiet"]
    try:
        _extract(given, options)
    except KeyboardInterrupt as stop:
        where = str(stop) or "nothing was computed yet"
        say(f"zarrtrace: {where}; the same command goes on there", err=True)
        raise
    if not quiet:
        from zarrtrace.cli.info_ import show

        say(show(given["output"], as_json=given["as_json"]))


def _extract(given: dict[str, Any], options: Options) -> None:
    """Extract here, or on a cluster."""
    from zarrtrace.extraction import extract_run

    quiet = given["quiet"]
    how: dict[str, Any] = {
        "overwrite": given["overwrite"],
        "repair": given["repair"],
        "allow_nonfinite": given["allow_nonfinite"],
        "accept_versions": given["accept_versions"],
        "progress": None if quiet else "bars" if show_progress(quiet=quiet) else "lines",
    }
    where = {name: given[name] for name in _CLUSTER}
    if all(value is None for value in where.values()):
        extract_run(given["output"], options, **how)
        return
    try:
        from zarrtrace.extraction.cluster import extract_on_cluster
        from zarrtrace.extraction.connecting import connected
    except ModuleNotFoundError as error:
        raise missing_for_cluster(error) from error
    with connected(**where, device=options.device) as client:
        extract_on_cluster(client, given["output"], options, **how)


def _options(given: dict[str, Any]) -> Options:
    from zarrtrace.extraction import Options

    _check_layers(given)
    return Options(
        model=given["model"],
        revision=given["revision"],
        trust_remote_code=given["trust_remote_code"],
        sae_release=given["sae_release"],
        sae_ids=given["sae_id"],
        sae_path=given["sae_path"],
        fold_decoder_norm=given["fold_decoder_norm"],
        layers=given["layers"],
        layer_start=given["layer_start"],
        layer_end=given["layer_end"],
        features=not given["no_features"],
        attention=not given["no_attention"],
        scenarios=given["scenarios"],
        only=given["scenario"],
        device=_device(given),
        dtype=given["dtype"],
        batch_size=given["batch_size"],
        queries=given["queries"],
        attention_capture=given["attention_capture"],
        attention_dtype=given["attention_dtype"],
        attention_keepbits=given["attention_keepbits"],
        feature_dtype=given["feature_dtype"],
        prepend_bos=given["prepend_bos"],
        low_memory=given["low_memory"],
    )


def _check_layers(given: dict[str, Any]) -> None:
    start, end = given["layer_start"], given["layer_end"]
    if given["layers"] is not None and (start, end) != (None, None):
        raise click.UsageError("Give either --layers, or --layer-start and --layer-end.")
    if start is not None and end is not None and end < start:
        raise click.UsageError(f"--layer-end {end} is before --layer-start {start}.")


def _device(given: dict[str, Any]) -> str:
    if given["gpu"] is None:
        return given["device"] or "cpu"
    if given["device"] is not None:
        raise click.UsageError("Give either --device or --gpu.")
    return f"cuda:{given['gpu']}"


def _plan(job: Job, need: Estimate, output: Location, *, as_json: bool) -> str:
    from zarrtrace.format.attributes import ranges

    if as_json:
        import dataclasses

        plan: dict[str, Any] = {
            "output": str(output),
            "config": dict(job.config),
            **dataclasses.asdict(need),
        }
        plan["notes"] = list(job.notes)
        return json_text(plan)
    rows = [[name, str(count)] for name, count in need.tokens.items()]
    saes = f"{len(job.saes)} SAEs" if job.saes else "no SAEs"
    model = job.model.attributes.id
    layers = f"{len(job.layers)} layers ({ranges(job.layers)})"
    lines = [
        f"Would extract {len(rows)} scenarios × {layers} of {model} with {saes}",
        f"into {output}:",
        *job.notes,
        "",
        table(["scenario", "tokens"], rows),
        "",
        f"disk           about {readable(need.disk_bytes)} (dense {readable(need.dense_bytes)})",
        f"host memory    about {readable(need.host_bytes)}",
        f"device memory  about {readable(need.device_bytes)}"
        if need.device_bytes
        else "device memory  none: the model runs on the CPU",
        "",
        "Disk assumes 64 active features a token. Nothing was written.",
    ]
    return "\n".join(lines)
