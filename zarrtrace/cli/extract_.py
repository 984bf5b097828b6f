"""``zarrtrace extract``."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from zarrtrace.cli.commands import Command
from zarrtrace.cli.extraction_options import extraction_options
from zarrtrace.cli.generation_options import SAMPLING
from zarrtrace.cli.shared import json_text, one_of, say, show_progress, table
from zarrtrace.errors import missing_for_cluster, readable

if TYPE_CHECKING:
    from zarrtrace.extraction import Estimate, Job, Options
    from zarrtrace.extraction.progress import Shown
    from zarrtrace.scenarios import Scenario, ScenarioStream
    from zarrtrace.storage import Location

# How to ask for the embedded scenarios.
_EMBEDDED = "slot-machine"
_CLUSTER = ("workers", "scheduler", "scheduler_file")
# Options that a table does not have.
_OF_TRACES = (*_CLUSTER, "attention_dtype", "attention_keepbits", "attention_positions")
_FAILED_SHOWN = 10
_EXAMPLES = [
    ("extract -o runs/demo", "The model that ships with zarrtrace, over its ten scenarios:"),
    (
        'extract -o runs/mine --model gpt2 --no-features --prompt "Paris is in"',
        "Attention of your own model and prompt:",
    ),
    (
        "extract -o runs/mine --model gpt2 --sae-release gpt2-small-res-jb --scenarios mine.yaml",
        "With SAE features, for a file of prompts with named spans:",
    ),
]


@click.command("extract", cls=Command, examples=_EXAMPLES)
@extraction_options
def command(**given: Any) -> None:
    """Run a model over prompts and store attention and SAE features.

    One labelled Zarr store a prompt, in the folder --output or in an object store (s3://, gs://,
    az://). The same command resumes a run that was interrupted. Without a model and prompts, the
    embedded model runs over ten embedded ones.
    """
    _check(given)
    scenarios = _scenarios(given)
    count = _count_and_check_output(given, scenarios)
    if not given["quiet"]:
        say(f"zarrtrace: {_first_line(given, count)}", err=True)
    silence_libraries()
    options = _options(given, scenarios or given["scenarios"])
    _check_model(given, options)
    if given["dry_run"]:
        say(_plan(given, options))
        return
    try:
        _extract(given, options)
    except KeyboardInterrupt as stop:
        where = str(stop) or "nothing was computed yet"
        say(f"zarrtrace: {where}; the same command resumes there", err=True)
        raise
    if not given["quiet"]:
        from zarrtrace.cli.info_ import show

        say(show(given["output"], as_json=given["as_json"]))
    _say_what_next(given)


def _say_what_next(given: dict[str, Any]) -> None:
    """Say how to look at the run; of a table, with exit code 3, which scenarios failed."""
    output = str(given["output"])
    if given["layout"] == "traces":
        if not given["quiet"]:
            say(f"\nLook at it: {shlex.join(['zarrtrace', 'view', output])}", err=True)
        return
    from zarrtrace.store import open_table

    failed = open_table(given["output"]).attrs["failed"]
    for name, reason in list(failed.items())[:_FAILED_SHOWN]:
        say(f"zarrtrace: {name}: not computed, its values are NaN: {reason}", err=True)
    if failed:
        many = f"{len(failed):,} scenarios were" if len(failed) > 1 else "1 scenario was"
        say(f"zarrtrace: {many} not computed", err=True)
        raise SystemExit(3)
    if not given["quiet"]:
        say(f"\nOpen it: zarrtrace.open_table({output!r})", err=True)


def _check(given: dict[str, Any]) -> None:
    """Refuse options that contradict each other."""
    if given["overwrite"] and given["repair"]:
        raise click.UsageError("Give either --overwrite or --repair.")
    if given["prompts"] and given["scenarios"]:
        raise click.UsageError("Give either --prompt or a file of prompts, --scenarios.")
    one_of({f"--{name.replace('_', '-')}": given[name] for name in _CLUSTER})
    if given["layout"] == "table":
        from zarrtrace.extraction.options import refuse_for_table

        unused = {name: given[name] for name in _OF_TRACES}
        refuse_for_table({**unused, "allow_nonfinite": given["allow_nonfinite"] or None})
    _device(given)


def _scenarios(given: dict[str, Any]) -> tuple[Scenario, ...] | ScenarioStream | None:
    """Read the scenarios, which takes no torch; None if they are the embedded ones."""
    from zarrtrace.scenarios import as_scenarios, stream

    read = as_scenarios if given["layout"] == "traces" else stream
    if given["prompts"]:
        return read(given["prompts"])
    if given["scenarios"] is None or str(given["scenarios"]) == _EMBEDDED:
        return None
    return read(given["scenarios"])


def _count_and_check_output(
    given: dict[str, Any], scenarios: tuple[Scenario, ...] | ScenarioStream | None
) -> int:
    """Count scenarios; refuse a folder that is not a run, or a run of other scenarios."""
    from zarrtrace import demo
    from zarrtrace.scenarios import stream, trace_name

    every = stream(demo.suite_path() if scenarios is None else scenarios).only(given["only"])
    if given["layout"] == "table":
        _check_output(given, None)
        return len(every)
    names = [scenario.name for scenario in every]
    if given["generate"] is not None and given["samples"] > 1:
        names = [trace_name(name, n) for name in names for n in range(given["samples"])]
    _check_output(given, names)
    return len(every)


def _check_output(given: dict[str, Any], names: list[str] | None) -> None:
    """Refuse what is there; `names` are those of a run's scenarios, None for a table."""
    output: Location = given["output"]
    if output.path is None:
        return  # in an object store this may take long, and is done later
    from zarrtrace.identity import refuse_other_scenarios
    from zarrtrace.store import check_target, read_run

    how = {name: given[name] for name in ("overwrite", "repair")}
    check_target(output, "run" if names is not None else "table", **how)
    if names is not None and not any(how.values()) and (output / "zarr.json").is_file():
        run = read_run(output).attributes
        if given["generate"] is not None or "generation" in run.config:
            _check_generation(given, output, run.config)
        refuse_other_scenarios(output, run.scenarios, names)


def _check_generation(given: dict[str, Any], output: Location, config: Mapping[str, Any]) -> None:
    """Refuse a run of other continuations."""
    from zarrtrace.extraction.configuration import generation_config
    from zarrtrace.identity import refuse_other

    options = _options(given, None)
    now = None if options.generate is None else generation_config(options)
    refuse_other(output, {"generation": config.get("generation")}, {"generation": now})


def _check_model(given: dict[str, Any], options: Options) -> None:
    """Refuse what can be refused before torch is imported: options, a model, its layers."""
    import json

    from zarrtrace import demo
    from zarrtrace.extraction.layers import choose_layers
    from zarrtrace.extraction.options import find_scenarios, find_stream
    from zarrtrace.hub import refuse_absent, snapshot_folder

    find = find_scenarios if given["layout"] == "traces" else find_stream
    find(options)
    if any(given[name] is not None for name in _CLUSTER):
        return  # workers may have other files
    if options.own_model:
        refuse_absent(options.own_model, options.revision)
    model = options.own_model or str(demo.model_path())
    try:
        config = json.loads((snapshot_folder(model, options.revision) / "config.json").read_text())
        blocks = config.get("text_config", config)["num_hidden_layers"]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return  # transformers will say more
    if isinstance(blocks, int):
        choose_layers(options, blocks, None)


def _first_line(given: dict[str, Any], count: int) -> str:
    """Say what begins now, and takes seconds."""
    what = f"{count} scenario{'' if count == 1 else 's'}"
    if given["generate"] is not None and given["samples"] > 1:
        what += f", {given['samples']} continuations each,"
    where = f"{what} into {given['output']}"
    if given["scheduler"] or given["scheduler_file"]:
        return f"{where}; connecting to the cluster …"
    if given["workers"]:
        return f"{where}; starting {given['workers']} processes …"
    return f"{where}; loading torch and transformers …"


def silence_libraries() -> None:
    """Silence libraries: their errors come as exceptions."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    libraries = "huggingface_hub|sae_lens|torch|transformer_lens|transformers"
    warnings.filterwarnings("ignore", module=rf"({libraries})\b")


def _progress(given: dict[str, Any]) -> Shown:
    if given["quiet"]:
        return None
    return "bars" if show_progress(quiet=False) else "lines"


def _extract(given: dict[str, Any], options: Options) -> None:
    """Extract here, or on a cluster."""
    from zarrtrace.extraction import extract_run

    how: dict[str, Any] = {
        "overwrite": given["overwrite"],
        "repair": given["repair"],
        "accept_versions": given["accept_versions"],
        "progress": _progress(given),
    }
    if given["layout"] == "table":
        from zarrtrace.extraction.options import find_stream
        from zarrtrace.extraction.table import extract_table

        extract_table(given["output"], options, find_stream(options), **how)
        return
    how["allow_nonfinite"] = given["allow_nonfinite"]
    where = {name: given[name] for name in _CLUSTER}
    if all(value is None for value in where.values()):
        extract_run(given["output"], options, **how)
        return
    from zarrtrace.extraction import fork_server

    forked = bool(given["workers"]) and fork_server.start(given["workers"], options)
    try:
        from zarrtrace.extraction.cluster import extract_on_cluster
        from zarrtrace.extraction.connecting import connected
    except ModuleNotFoundError as error:
        raise missing_for_cluster(error) from error
    with connected(**where, device=options.device, forked=forked) as client:
        extract_on_cluster(client, given["output"], options, **how)


def _options(given: dict[str, Any], scenarios: object) -> Options:
    from zarrtrace.extraction import Options
    from zarrtrace.extraction.options import sampling_of

    return Options(
        model=given["model"],
        revision=given["revision"],
        trust_remote_code=given["trust_remote_code"],
        sae_release=given["sae_release"],
        sae_ids=given["sae_ids"],
        sae_path=given["sae_path"],
        fold_decoder_norm=given["fold_decoder_norm"],
        sae_products=given["sae_products"],
        layers=given["layers"],
        layer_start=given["layer_start"],
        layer_end=given["layer_end"],
        features=not given["no_features"],
        attention=not given["no_attention"],
        residual=given["residual"],
        scenarios=scenarios,
        only=given["only"],
        device=_device(given),
        dtype=given["dtype"],
        batch_size=given["batch_size"],
        positions=given["positions"],
        attention_positions=given["attention_positions"],
        attention_capture=given["attention_capture"],
        attention_dtype=given["attention_dtype"],
        attention_keepbits=given["attention_keepbits"],
        feature_dtype=given["feature_dtype"],
        residual_dtype=given["residual_dtype"],
        prepend_bos=given["prepend_bos"],
        generation_prompt=given["generation_prompt"],
        low_memory=given["low_memory"],
        generate=sampling_of(given["generate"], **{name: given[name] for name in SAMPLING}),
        answer=given["answer"],
    )


def _device(given: dict[str, Any]) -> str:
    if given["gpu"] is None:
        return given["device"] or "cpu"
    if given["device"] is not None:
        raise click.UsageError("Give either --device or --gpu.")
    return f"cuda:{given['gpu']}"


def _plan(given: dict[str, Any], options: Options) -> str:
    """Say what would be done."""
    from zarrtrace.extraction import estimate, prepare
    from zarrtrace.extraction.estimates import estimate_table
    from zarrtrace.extraction.options import find_stream
    from zarrtrace.extraction.table import prepare_table

    if given["layout"] == "table":
        shown = _progress(given)
        stream = find_stream(options)
        with prepare_table(options, stream, weights=False, progress=shown) as found:
            job, need, count = found.job, estimate_table(found), found.survey.scenarios
            what = f"{found.survey.samples:,} samples of {count:,} scenarios"
            config = dict(found.plan().config)
    else:
        job = prepare(options, weights=False, progress=_progress(given) == "bars")
        need, config = estimate(job), dict(job.config)
        what = f"{len(need.tokens)} scenarios"
        if options.generate is not None:
            what = f"{len(need.tokens)} continuations of {len(job.prompts)} scenarios"
    if given["as_json"]:
        import dataclasses

        plan: dict[str, Any] = {
            "output": str(given["output"]),
            "config": config,
            **dataclasses.asdict(need),
        }
        plan["notes"] = list(job.notes)
        return json_text(plan)
    return _plan_text(job, need, given["output"], what)


def _plan_text(job: Job, need: Estimate, output: Location, what: str) -> str:
    from zarrtrace.format.attributes import ranges
    from zarrtrace.scenarios import split_trace_name

    tokens = {split_trace_name(name)[0]: count for name, count in need.tokens.items()}
    rows = [[name, str(count)] for name, count in tokens.items()]
    saes = f"{len(job.saes)} SAEs" if job.saes else "no SAEs"
    model = job.model.attributes.id
    layers = f"{len(job.layers)} layers ({ranges(job.layers)})"
    lines = [
        f"Would extract {what} × {layers} of {model} with {saes}",
        f"into {output}:",
        *job.notes,
        "",
        *([table(["scenario", "tokens"], rows), ""] if rows else []),
        f"disk           about {readable(need.disk_bytes)} (dense {readable(need.dense_bytes)})",
        f"host memory    about {readable(need.host_bytes)}",
        f"device memory  about {readable(need.device_bytes)}"
        if need.device_bytes
        else "device memory  none: the model runs on the CPU",
        "",
        "Disk assumes 64 active features a token. Nothing was written.",
    ]
    return "\n".join(lines)
