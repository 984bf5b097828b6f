"""From options to a job: everything a run needs, checked against each other."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zarrtrace import demo
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.scenarios import Scenario, load_suite
from zarrtrace.spec import (
    SAEAttributes,
    TraceAttributes,
    TraceShape,
    ranges,
)

#: The mission's layers: L1 to L31.
DEFAULT_LAYERS = tuple(range(1, 32))
#: What the embedded model is called in a trace.
DEMO_MODEL = "zarrtrace-demo"

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
    capture = capture_package()
    source = _sae_source(options) if options.features else None
    # All that can be wrong is found out before the weights are read, which takes minutes.
    model = _load_model(options, capture, weights=False)
    layers = _layers(options, model)
    saes = {} if source is None else _find_saes(source, layers, model)
    prepend_bos = _prepend_bos(options, model, source)
    prompts = tuple(
        capture.tokenize(model, scenario, prepend_bos=prepend_bos) for scenario in scenarios
    )
    if weights:
        model = _load_model(options, capture, weights=True)
    model = capture.renamed(model, options.model or DEMO_MODEL, prepend_bos=prepend_bos)
    return Job(
        options=options,
        model=model,
        prompts=prompts,
        layers=layers,
        source=source,
        saes=saes,
        config=_config(options, model, layers, saes, scenarios),
    )


def _load_model(options: Options, capture: Any, *, weights: bool) -> Any:
    return capture.load_model(
        options.model or str(demo.model_path()),
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        weights=weights,
    )


def capture_package() -> Any:
    """Return :mod:`zarrtrace.capture`, which needs torch.

    Raises
    ------
    ConfigError
        If the extra ``extract`` is not installed.
    """
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


def _sae_source(options: Options) -> Any:
    from zarrtrace.capture.saes import FolderSAEs, ReleaseSAEs  # noqa: PLC0415 -- takes seconds

    if options.sae_release:
        return ReleaseSAEs(options.sae_release, options.sae_id)
    return FolderSAEs(options.sae_path or demo.sae_path())


def _find_saes(source: Any, layers: Sequence[int], model: Any) -> dict[int, SAEAttributes]:
    from zarrtrace.capture.saes import check_width  # noqa: PLC0415

    found: dict[int, SAEAttributes] = source.find(layers)
    check_width(found, model.d_model)
    return found


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
        "layers": ranges(layers),
        "attention": options.attention,
        "attention_dtype": options.attention_dtype,
        "features": options.features,
        "feature_dtype": options.feature_dtype,
        "sae_release": options.sae_release,
        "saes": [sae.id for sae in saes.values()],
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
