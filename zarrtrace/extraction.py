"""The main job: scenarios in, one labelled Zarr store each out.

``for record in capture(...): writer.append(record)``, with compression and writing beside the
computation, a bounded number of records between the two, and resume.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tqdm import tqdm

from zarrtrace import demo
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.scenarios import Scenario, load_suite
from zarrtrace.spec import (
    LayerRecord,
    SAEAttributes,
    TokensRecord,
    TraceAttributes,
    TraceShape,
)
from zarrtrace.store import RunWriter, TraceWriter, kind_of

#: The mission's layers: L1 to L31.
DEFAULT_LAYERS = tuple(range(1, 32))
#: What the embedded model is called in a trace.
DEMO_MODEL = "zarrtrace-demo"

_WRITERS = 2
_RECORDS_IN_FLIGHT = 4
_LIBRARIES = ("zarrtrace", "numpy", "sae-lens", "torch", "transformers", "zarr")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Options:
    """What to extract.

    Attributes
    ----------
    model, revision, trust_remote_code
        The language model; None is the embedded one.
    sae_release, sae_id, sae_path
        The SAEs: a release that sae-lens knows with an optional pattern of ids, or a folder.
    layers
        Indices of decoder blocks; None is 1 to 31, the mission's.
    features, attention
        What to store.
    scenarios
        File of scenarios; None is the embedded suite.
    only
        Names of scenarios; empty means all.
    device, dtype, batch_size
        Where and how the model computes.
    attention_dtype
        None stores losslessly what the model computed.
    feature_dtype
        Precision in which features are stored.
    prepend_bos
        None does as the SAEs were trained, else if the tokenizer has a BOS token.
    """

    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    sae_release: str | None = None
    sae_id: str | None = None
    sae_path: Path | None = None
    layers: tuple[int, ...] | None = None
    features: bool = True
    attention: bool = True
    scenarios: Path | None = None
    only: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: Dtype = "auto"
    batch_size: int = 1
    attention_dtype: StoredDtype | None = None
    feature_dtype: StoredDtype = "float32"
    prepend_bos: bool | None = None


def extract(
    output: str | Path,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Run a model over scenarios and store attention, features and continuations.

    A run that exists is gone on with, if it was asked for alike.

    Parameters
    ----------
    output
        Folder of the run.
    options
        What to extract; by default the embedded model, SAEs and scenarios.
    overwrite
        Replace a run that exists, once the new one is finished.
    progress
        Whether to draw progress bars on stderr.

    Returns
    -------
    Path
        The run.

    Raises
    ------
    ConfigError, ScenarioError
        If options do not fit the model, the SAEs or each other.
    ModelError, SAEError
        If the model or an SAE cannot be used.
    StoreError
        If `output` cannot be written, or is another run.
    """
    output = Path(output)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        kind_of(output)  # refuse a foreign folder before hours of work
    job = prepare(options or Options())
    with RunWriter(
        output,
        [prompt.scenario.name for prompt in job.prompts],
        job.config,
        overwrite=overwrite,
    ) as run:
        writers = [
            run.trace(job.attributes(prompt), job.shape(prompt), prompt.tokens)
            for prompt in job.prompts
        ]
        for writer in writers:
            if not writer.missing_layers and not writer.needs_tokens:
                writer.finish()  # an earlier process may have stopped just before it
        _fill(job, writers, progress=progress)
        run.finish()
    return output


# --- from options to a job ---------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Options that were found to fit each other, with everything they refer to.

    Attributes
    ----------
    options
        What was asked for.
    model
        The language model; without weights if it was prepared so.
    prompts
        Tokenised scenarios.
    layers
        Ascending indices of decoder blocks.
    source, saes
        Where SAEs come from and which one each layer has; None and empty without features.
    config
        What a resumed run must agree with.
    """

    options: Options
    model: Any
    prompts: tuple[Any, ...]
    layers: tuple[int, ...]
    source: Any
    saes: Mapping[int, SAEAttributes]
    config: Mapping[str, Any]

    @property
    def attention_dtype(self) -> StoredDtype | None:
        """Precision of stored attention: lossless unless asked otherwise."""
        if not self.options.attention:
            return None
        half = self.model.attributes.dtype == "float16"
        return self.options.attention_dtype or ("float16" if half else "float32")

    def shape(self, prompt: Any) -> TraceShape:
        """Sizes of a prompt's trace."""
        return TraceShape(
            layers=len(self.layers),
            tokens=len(prompt.tokens.ids),
            heads=self.model.n_heads if self.options.attention else None,
            features={sae.variable: sae.d_sae for sae in self.saes.values()},
            attention_dtype=self.attention_dtype,
            feature_dtype=self.options.feature_dtype if self.saes else None,
        )

    def attributes(self, prompt: Any) -> TraceAttributes:
        """Say everything of a prompt's trace but what is stored."""
        return TraceAttributes(
            scenario=prompt.scenario.name,
            prompt=prompt.scenario.prompt,
            tags=tuple(prompt.scenario.tags),
            spans=prompt.spans,
            options=prompt.options,
            model=self.model.attributes,
            saes=tuple(self.saes.values()),
            layers=self.layers,
            layers_without_sae=tuple(
                layer for layer in self.layers if self.saes and layer not in self.saes
            ),
            attention_dtype=self.attention_dtype,
            feature_dtype=self.options.feature_dtype if self.saes else None,
            versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
        )


def prepare(options: Options, *, weights: bool = True) -> Job:
    """Check options against the model, the SAEs and each other.

    Parameters
    ----------
    options
        What to extract.
    weights
        False leaves out the model's weights; enough to estimate a run.

    Raises
    ------
    ConfigError, ScenarioError, ModelError, SAEError
        As for :func:`extract`.
    """
    _check(options)
    scenarios = _scenarios(options)
    capture = _capture_package()
    model = capture.load_model(
        options.model or str(demo.model_path()),
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        weights=weights,
    )
    layers = _layers(options, model)
    source = _sae_source(options, capture) if options.features else None
    saes = {} if source is None else source.find(layers)
    capture.check_width(saes, model.d_model)
    prepend_bos = _prepend_bos(options, model, source)
    model = capture.renamed(model, options.model or DEMO_MODEL, prepend_bos=prepend_bos)
    prompts = tuple(
        capture.tokenize(model, scenario, prepend_bos=prepend_bos) for scenario in scenarios
    )
    return Job(
        options=options,
        model=model,
        prompts=prompts,
        layers=layers,
        source=source,
        saes=saes,
        config=_config(options, model, layers, saes, scenarios),
    )


def _capture_package() -> Any:
    try:
        from zarrtrace import capture  # noqa: PLC0415 -- torch takes seconds
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"extracting needs {error.name}, which is not installed",
            why="Reading and analysing work without torch, so it is an extra.",
            remedy="pip install 'zarrtrace[extract]'",
        ) from error
    return capture


def _check(options: Options) -> None:
    if not options.attention and not options.features:
        raise ConfigError(
            "--no-attention and --no-features leave nothing to extract",
            remedy="Drop one of the two.",
        )
    if options.sae_release and options.sae_path:
        raise ConfigError(
            "--sae-release and --sae-path both say where SAEs come from",
            remedy="Give one of the two.",
        )
    if options.sae_id and not options.sae_release:
        raise ConfigError(
            "--sae-id chooses from a release, and none is given", remedy="Add --sae-release."
        )
    if options.model and options.features and not (options.sae_release or options.sae_path):
        raise ConfigError(
            f"no SAEs given for {options.model}",
            why="Features need SAEs that were trained on this model.",
            remedy="Add --sae-release or --sae-path, or use --no-features.",
        )
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}", remedy="Give 1 or more.")


def _scenarios(options: Options) -> tuple[Scenario, ...]:
    scenarios = load_suite(options.scenarios or demo.suite_path())
    names = [scenario.name for scenario in scenarios]
    for name in options.only:
        if name not in names:
            raise ScenarioError(
                f"no scenario {name!r}", remedy=f"The suite has: {', '.join(names[:20])}."
            )
    return tuple(s for s in scenarios if not options.only or s.name in options.only)


def _layers(options: Options, model: Any) -> tuple[int, ...]:
    count = len(model.blocks)
    if options.layers is None:
        return tuple(layer for layer in DEFAULT_LAYERS if layer < count)
    layers = tuple(sorted(set(options.layers)))
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside or not layers:
        raise ConfigError(
            f"--layers {', '.join(map(str, outside)) or '(none)'}: the model has blocks 0 to "
            f"{count - 1}",
            why="A layer is the decoder block's own index, counted from 0.",
            remedy=f"Give layers within 0-{count - 1}.",
        )
    return layers


def _sae_source(options: Options, capture: Any) -> Any:
    if options.sae_release:
        return capture.ReleaseSAEs(options.sae_release, options.sae_id)
    return capture.FolderSAEs(options.sae_path or demo.sae_path())


def _prepend_bos(options: Options, model: Any, source: Any) -> bool:
    if options.prepend_bos is not None:
        return options.prepend_bos
    trained = None if source is None else source.prepend_bos
    return model.tokenizer.bos_token_id is not None if trained is None else bool(trained)


def _config(
    options: Options,
    model: Any,
    layers: Sequence[int],
    saes: Mapping[int, SAEAttributes],
    scenarios: Sequence[Scenario],
) -> dict[str, Any]:
    """Everything that decides what is stored, as JSON."""
    attributes = model.attributes
    return {
        "model": attributes.id,
        "revision": attributes.revision,
        "dtype": attributes.dtype,
        "prepend_bos": attributes.prepend_bos,
        "device": model.device.type,
        "batch_size": options.batch_size,
        "layers": list(layers),
        "attention": options.attention,
        "attention_dtype": options.attention_dtype,
        "features": options.features,
        "feature_dtype": options.feature_dtype,
        "sae_release": options.sae_release,
        "saes": {str(layer): sae.id for layer, sae in saes.items()},
        "prompts": {scenario.name: _digest(scenario) for scenario in scenarios},
    }


def _digest(scenario: Scenario) -> str:
    content = [
        scenario.prompt,
        sorted(scenario.spans.items()),
        list(scenario.tags),
        sorted(scenario.options.items()),
    ]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


# --- running a job -----------------------------------------------------------------------------


def _fill(job: Job, writers: Sequence[TraceWriter], *, progress: bool) -> None:
    """Capture what is missing and hand it to the writers."""
    capture = _capture_package()
    by_name = {
        prompt.scenario.name: writer for prompt, writer in zip(job.prompts, writers, strict=True)
    }
    requests = [
        capture.Request(prompt, frozenset(writer.missing_layers), writer.needs_tokens)
        for prompt, writer in zip(job.prompts, writers, strict=True)
    ]
    records: Iterator[LayerRecord | TokensRecord] = capture.capture(
        job.model,
        requests,
        attention_dtype=job.attention_dtype,
        saes=job.saes,
        source=job.source,
        batch_size=job.options.batch_size,
    )
    with _Progress(requests, shown=progress) as bars, _WriterPool(by_name, bars.stored) as pool:
        for record in records:
            pool.submit(record)


class _WriterPool:
    """Append records beside the computation; at most a few wait.

    The first error of a writer ends the capture: :meth:`submit` raises it.
    """

    def __init__(self, writers: Mapping[str, TraceWriter], stored: Any) -> None:
        self._writers, self._stored = writers, stored
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="zarrtrace-write")
        self._room = threading.Semaphore(_RECORDS_IN_FLIGHT)
        self._failed: list[BaseException] = []
        self._finished: set[str] = set()
        self._mutex = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def submit(self, record: LayerRecord | TokensRecord) -> None:
        """Queue a record; waits while too many are queued."""
        self._room.acquire()
        self._raise_first()
        self._pool.submit(self._append, record).add_done_callback(self._done)

    def _append(self, record: LayerRecord | TokensRecord) -> None:
        if self._failed:
            return
        writer = self._writers[record.scenario]
        writer.append(record)
        complete = self._is_last(record.scenario, writer)
        if complete:
            writer.finish()
        self._stored(record, complete)

    def _is_last(self, scenario: str, writer: TraceWriter) -> bool:
        """Whether a trace has just got its last record; true once."""
        with self._mutex:
            if scenario in self._finished or writer.missing_layers or writer.needs_tokens:
                return False
            self._finished.add(scenario)
            return True

    def _done(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._failed.append(error)
        self._room.release()

    def _raise_first(self) -> None:
        if self._failed:
            raise self._failed[0]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Records in hand are still stored when the capture fails or is interrupted.
        self._pool.shutdown(wait=True)
        if kind is None:
            self._raise_first()


class _Progress:
    """Two bars on stderr: layers of all scenarios, and scenarios."""

    def __init__(self, requests: Sequence[Any], *, shown: bool) -> None:
        self._mutex = threading.Lock()
        self._layers = tqdm(
            total=sum(len(request.layers) for request in requests),
            desc="layers",
            unit="layer",
            disable=not shown,
            file=sys.stderr,
        )
        self._scenarios = tqdm(
            total=len(requests),
            initial=sum(request.done for request in requests),
            desc="scenarios",
            unit="scenario",
            disable=not shown,
            file=sys.stderr,
        )

    def __enter__(self) -> Self:
        return self

    def stored(self, record: LayerRecord | TokensRecord, complete: bool) -> None:  # noqa: FBT001
        """Count a record."""
        with self._mutex:
            if isinstance(record, LayerRecord):
                self._layers.update()
            if complete:
                self._scenarios.update()

    def __exit__(self, *_: object) -> None:
        self._scenarios.close()
        self._layers.close()
