"""The Python call: names or loaded objects in, the opened run out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, Unpack, cast, overload

from zarrtrace.errors import ConfigError, missing_for_cluster
from zarrtrace.extraction.arguments import (
    layers_of,
    of_model,
    plain,
    with_saes,
    with_tokenizer,
)
from zarrtrace.extraction.options import (
    AttentionCapture,
    Dtype,
    Loaded,
    Options,
    Products,
    StoredDtype,
    find_scenarios,
    find_stream,
    refuse_for_table,
    sampling_of,
    whole_number,
)
from zarrtrace.extraction.progress import Shown
from zarrtrace.extraction.running import extract_run
from zarrtrace.extraction.table import extract_table
from zarrtrace.scenarios.positions import parse_positions
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import open_run, open_table

if TYPE_CHECKING:
    import torch
    import xarray as xr
    from sae_lens import SAE
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from zarrtrace.scenarios import Scenario

    # pandas frames and Datasets are iterables, too.
    Scenarios: TypeAlias = str | Path | Scenario | Mapping[str, Any] | Iterable[Any]
    SAEs: TypeAlias = (
        str
        | Path
        | tuple[str, ...]
        | SAE[Any]
        | Sequence[SAE[Any]]
        | Mapping[int, SAE[Any] | Sequence[SAE[Any]]]
    )


class ExtractOptions(TypedDict, total=False):
    """Options of :func:`extract` for type checkers; `layout` decides what it returns."""

    model: str | Path | PreTrainedModel | None
    tokenizer: str | Path | PreTrainedTokenizerBase | None
    saes: SAEs | None
    layers: int | str | Iterable[int] | None
    attention: bool
    features: bool
    residual: bool
    scenario: str | Sequence[str]
    positions: str | int | Iterable[int] | Iterable[str]
    attention_positions: str | int | Iterable[int] | Iterable[str] | None
    revision: str | None
    fold_decoder_norm: bool
    sae_products: Products
    device: str | torch.device | None
    dtype: Dtype | torch.dtype
    low_memory: bool
    batch_size: int | None
    attention_capture: AttentionCapture
    attention_dtype: StoredDtype | None
    attention_keepbits: int | None
    feature_dtype: StoredDtype
    residual_dtype: StoredDtype
    prepend_bos: bool | None
    generation_prompt: bool
    generate: int | None
    temperature: float
    top_p: float
    samples: int
    seed: int
    stop: str | Sequence[str]
    answer: str | None
    trust_remote_code: bool
    overwrite: bool
    repair: bool
    allow_nonfinite: bool
    accept_versions: bool
    workers: int | None
    scheduler: str | None
    scheduler_file: str | Path | None
    storage_options: Mapping[str, str] | None
    quiet: bool


@overload
def extract(
    output: Address,
    scenarios: Scenarios | None = None,
    *,
    layout: Literal["traces"] = "traces",
    **options: Unpack[ExtractOptions],
) -> xr.DataTree: ...
@overload
def extract(
    output: Address,
    scenarios: Scenarios | None = None,
    *,
    layout: Literal["table"],
    **options: Unpack[ExtractOptions],
) -> xr.Dataset: ...
def extract(
    output: Address,
    scenarios: Scenarios | None = None,
    *,
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    saes: SAEs | None = None,
    layers: int | str | Iterable[int] | None = None,
    attention: bool = True,
    features: bool = True,
    residual: bool = False,
    layout: Literal["traces", "table"] = "traces",
    scenario: str | Sequence[str] = (),
    positions: str | int | Iterable[int] | Iterable[str] = "all",
    attention_positions: str | int | Iterable[int] | Iterable[str] | None = None,
    revision: str | None = None,
    fold_decoder_norm: bool = False,
    sae_products: Products = "float32",
    device: str | torch.device | None = None,
    dtype: Dtype | torch.dtype = "auto",
    low_memory: bool = False,
    batch_size: int | None = None,
    attention_capture: AttentionCapture = "auto",
    attention_dtype: StoredDtype | None = None,
    attention_keepbits: int | None = None,
    feature_dtype: StoredDtype = "float32",
    residual_dtype: StoredDtype = "float32",
    prepend_bos: bool | None = None,
    generation_prompt: bool = True,
    generate: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    answer: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    repair: bool = False,
    allow_nonfinite: bool = False,
    accept_versions: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    scheduler_file: str | Path | None = None,
    storage_options: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> xr.DataTree | xr.Dataset:
    """Run a model over prompts, store its attention and SAE features, and open the run.

    If the run exists, it is resumed: what is stored is not computed again. The same prompts,
    weights and options are needed for that; whether the model was given by name or loaded does not
    matter.

    Parameters
    ----------
    output
        Folder of the run, or its address in an object store.
    scenarios
        A prompt, a :class:`zarrtrace.Scenario`, a mapping, a sequence of these, a file, a
        ``datasets.Dataset`` or a pandas frame; ``"slot-machine"`` is the embedded suite.
    model
        A name on the Hugging Face hub, a folder, or a loaded model of transformers; ``"demo"`` is
        the embedded one. A loaded model is used where and as it is, hooks on it included. While it
        runs it is in evaluation mode and computes attention eagerly; both are put back. Without
        `model` and `scenarios`, the embedded model runs over the embedded scenarios.
    tokenizer
        A tokenizer, or its name or folder. By default the model's own; of a loaded model, the one
        in the folder or the local cache that it was loaded from.
    saes
        A release that sae-lens knows; a tuple of a release and patterns of ids, as
        ``("llama_scope_lxr_8x", "l{layer}r_8x")``; a folder; or loaded SAEs of sae-lens: one,
        several, or by layer one or several. Loaded SAEs are used as they are,
        hooks and an ``encode`` of your own included, and are left as they are.
    layers
        Indices of decoder blocks, or a text such as ``"1-31"``. By default all, with features all
        that have an SAE.
    attention, features, residual
        Whether to store each. The residual stream is taken where the SAEs of ``features`` read it,
        so that they encode it to ``features``; without SAEs it is the output of each block.
    layout
        ``"traces"`` stores a trace a scenario. ``"table"`` stores one table of samples, of which
        each is a stored position of a scenario: for thousands of prompts. It has no attention.
    scenario
        Names of scenarios to keep; by default all.
    positions
        Token positions to store, for all arrays: ``"all"``, ``"last"``, ``"spans"`` (those of any
        span), names of spans (``"goal,balance"`` or a sequence), or integers, negative ones from
        the end. SAEs encode these tokens only. The prompt's other tokens remain keys of attention.
    attention_positions
        The `positions` whose rows of attention are stored, given likewise. By default all of
        them.
    revision
        Commit, tag or branch of the model on the hub.
    fold_decoder_norm
        Scale features to decoder directions of norm 1.
    sae_products
        ``"bfloat16"`` multiplies in bfloat16 on a GPU's tensor cores and adds up in float32, which
        is several times as fast and about as precise; for models and SAEs whose weights are
        bfloat16.
    device
        Where a model given by name computes, as ``"cuda:1"``. By default the CPU.
    dtype
        Precision of a model given by name; ``"auto"`` is the checkpoint's.
    low_memory
        Keep decoder blocks in host memory, and bring one at a time to the device.
    batch_size
        Scenarios in one forward pass. By default 1 on a CPU, more on a GPU that has the memory.
    attention_capture
        ``"whole"`` takes attention as whole matrices, ``"blocked"`` by blocks of queries;
        ``"auto"`` the latter where a matrix is large.
    attention_dtype
        Precision of stored attention; by default lossless.
    attention_keepbits
        Bits of the mantissa of attention to keep; by default all.
    feature_dtype, residual_dtype
        Precision of stored features and residual stream.
    prepend_bos
        Whether prompts begin with BOS. By default as the SAEs were trained, else if the tokenizer
        has a BOS token; prompts of messages, as the chat template writes them.
    generation_prompt
        Whether the chat template begins the assistant's next message, for scenarios with messages
        that do not say it. If not, a last message of the assistant's is continued.
    generate
        Number of tokens for which the model goes on after each prompt, at most. They are stored
        like those of the prompt, and are the span ``completion``. None generates nothing.
    temperature
        Temperature of sampling; 0 takes the most likely token at each step.
    top_p
        Sum of the probabilities of the most likely tokens among which one is sampled.
    samples
        Continuations of each prompt: ``NAME~0``, ``NAME~1``, … are the children of the run then.
    seed
        Seed of sampling. A continuation depends on it, its scenario's name and its number alone.
    stop
        Texts that end a continuation in which they appear.
    answer
        Regular expression: its first group (or all of it, without groups) is the span ``answer`` of
        a continuation, and the option that it names the attribute ``choice``. By default, the first
        option in the continuation is both.
    trust_remote_code
        Whether code that comes with the model may run.
    overwrite
        Replace a run that exists, once the new one is finished.
    repair
        Read every byte of a run that exists, and compute again what is damaged.
    allow_nonfinite
        Store NaN and infinity, and say where in the trace's attributes.
    accept_versions
        Resume a run that other versions of libraries began.
    workers
        Start this many processes, on GPUs one a GPU.
    scheduler, scheduler_file
        Use the Dask cluster at this address, or the one whose scheduler wrote this file.
    storage_options
        How to reach an object store, as in ``{"endpoint": "http://host:9000"}``.
    quiet
        Show no progress.

    Returns
    -------
    xr.DataTree or xr.Dataset
        The run, one child a scenario (of several continuations, one each), as
        :func:`zarrtrace.open_run` opens it; with ``layout="table"`` the table, as
        :func:`zarrtrace.open_table` opens it.

    Raises
    ------
    ConfigError, ScenarioError
        If something is missing, or options do not fit the model, the SAEs or each other.
    ModelError, SAEError
        If the model or an SAE cannot be used.
    NonFiniteError
        If NaN or infinity would be stored, and `allow_nonfinite` is false.
    StoreError
        If `output` cannot be written, or is another run.

    Examples
    --------
    >>> run = zt.extract("runs/mine", ["The capital of France is"], model="gpt2", features=False)
    >>> run = zt.extract("runs/own", prompts, model=hf_model, tokenizer=tok, saes={8: sae_8})
    >>> ds = run["scenario_0"].to_dataset()
    """
    where = locate(output, storage_options)
    options, loaded = of_model(
        Options(
            layers=layers_of(layers),
            attention=attention,
            features=features,
            residual=residual,
            scenarios=scenarios,
            only=(scenario,) if isinstance(scenario, str) else tuple(scenario),
            positions=parse_positions(positions, "positions"),
            attention_positions=None
            if attention_positions is None
            else parse_positions(attention_positions, "attention_positions"),
            revision=revision,
            fold_decoder_norm=fold_decoder_norm,
            sae_products=sae_products,
            device="cpu" if device is None else str(device),
            dtype=cast("Dtype", str(dtype).removeprefix("torch.")),  # checked with all others
            low_memory=low_memory,
            batch_size=batch_size,
            attention_capture=attention_capture,
            attention_dtype=attention_dtype,
            attention_keepbits=attention_keepbits,
            feature_dtype=feature_dtype,
            residual_dtype=residual_dtype,
            prepend_bos=prepend_bos,
            generation_prompt=generation_prompt,
            generate=sampling_of(
                generate,
                temperature=temperature,
                top_p=top_p,
                samples=samples,
                seed=seed,
                stop=stop,
            ),
            answer=answer,
            trust_remote_code=trust_remote_code,
        ),
        model,
        tokenizer,
        device_given=device is not None,
    )
    options, loaded = with_saes(plain(options), loaded, saes)
    if overwrite and repair:
        raise ConfigError("overwrite and repair contradict each other", remedy="Give one of them.")
    how: dict[str, Any] = {
        "overwrite": overwrite,
        "repair": repair,
        "accept_versions": accept_versions,
        "progress": _shown(quiet=quiet),
    }
    count = None if workers is None else whole_number("--workers", workers)
    cluster = {"workers": count, "scheduler": scheduler, "scheduler_file": scheduler_file}
    if layout == "table":
        unused = {
            **cluster,
            "allow_nonfinite": allow_nonfinite or None,
            "attention_dtype": attention_dtype,
            "attention_keepbits": attention_keepbits,
            "attention_positions": attention_positions,
        }
        refuse_for_table(unused)
        stream = find_stream(options, loaded)
        extract_table(where, options, stream, loaded=with_tokenizer(options, loaded), **how)
        return open_table(where)
    if layout != "traces":
        raise ConfigError(f"layout {layout!r}", remedy="Give 'traces' or 'table'.")
    how["allow_nonfinite"] = allow_nonfinite
    # Whatever is missing is said before torch is imported.
    how["scenarios"] = find_scenarios(options, loaded)
    loaded = with_tokenizer(options, loaded)
    if all(value is None for value in cluster.values()):
        extract_run(where, options, loaded=loaded, **how)
    else:
        _on_cluster(where, options, loaded, cluster, how)
    return open_run(where)


def _shown(*, quiet: bool) -> Shown:
    if quiet:
        return None
    return "bars" if "ipykernel.zmqshell" in sys.modules or sys.stderr.isatty() else "lines"


def _on_cluster(
    output: Location,
    options: Options,
    loaded: Loaded,
    cluster: Mapping[str, Any],
    how: Mapping[str, Any],
) -> None:
    given = [name for name, value in cluster.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} contradict each other", remedy="Give one.")
    if loaded != Loaded():
        raise ConfigError(
            f"{given[0]} with a model, a tokenizer or SAEs in memory",
            why="Other processes load them themselves.",
            remedy="Give their names or folders instead.",
        )
    try:
        from zarrtrace.extraction.cluster import extract_on_cluster  # noqa: PLC0415 -- an extra
        from zarrtrace.extraction.connecting import connected  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise missing_for_cluster(error) from error
    scheduler_file = cluster["scheduler_file"]
    where = {**cluster, "scheduler_file": None if scheduler_file is None else Path(scheduler_file)}
    with connected(**where, device=options.device) as client:
        extract_on_cluster(client, output, options, **how)
