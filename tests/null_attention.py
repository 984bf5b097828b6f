"""Error rates and power of critical_layers and layer_bands."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import planted
import xarray as xr
from rates import Experiment

from zarrtrace import analysis
from zarrtrace.analysis.bands import evaluate
from zarrtrace.format.attributes import SpanAttributes

# --- critical layers: words that get more or less attention than others ------------------------

LAYERS, TOKENS = 12, 90
SPANS = {"first": (20, 21), "second": (45, 46), "third": (60,), "fourth": (75, 76, 77)}
#: Standard deviation over words of the log of attention: a factor of two.
WORDS = np.log(2)

_Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape)


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, of variance 1."""
    return rng.standard_t(3, shape) / np.sqrt(3)


def word_run(
    seed: int,
    *,
    scenarios: int = 6,
    prompts: int = 1,
    draw: _Draw = normal,
    common: float = 0.5,
    noise: float = 0.2,
    layers: int = LAYERS,
    factor: float = 1.0,
) -> xr.DataTree:
    """Return a run whose words differ in the attention that the decision pays them.

    Parameters
    ----------
    prompts
        Number of texts that the scenarios are variants of. Variants have the same words at the
        same places, but for every tenth.
    draw
        Distribution of the words' effects.
    common
        Share of the words' variance that is common to all layers.
    noise
        Standard deviation over scenarios, in units of that over words.
    factor
        Factor of the attention that the span ``first`` gets in layer 3.
    """
    rng = np.random.default_rng(seed)
    effects, words = [], []
    for _ in range(prompts):
        own, shared = draw(rng, (layers, TOKENS)), draw(rng, (1, TOKENS))
        effects.append(WORDS * (np.sqrt(1 - common) * own + np.sqrt(common) * shared))
        words.append(rng.integers(0, 50_000, TOKENS))
    traces = {}
    recency = -np.log(TOKENS - np.arange(TOKENS)) / 2
    for number in range(scenarios):
        at = number % prompts
        ids = words[at].copy()
        ids[::10] = rng.integers(0, 50_000, len(ids[::10]))
        scores = recency + effects[at] + WORDS * noise * rng.normal(size=(layers, TOKENS))
        scores[2, list(SPANS["first"])] += np.log(factor)
        row = np.exp(scores)
        traces[f"S{number}"] = word_trace(f"S{number}", ids, row / row.sum(1, keepdims=True))
    return planted.as_run(traces)


def word_trace(name: str, ids: np.ndarray, row: np.ndarray) -> xr.Dataset:
    """Return a trace with the decision's attention alone, ``(layer, key)``."""
    layers, tokens = row.shape
    spans = {**SPANS, "decision": (tokens - 1,)}
    attributes = fakes.make_trace_attributes(
        name,
        layers=tuple(range(1, layers + 1)),
        heads=2,
        features=0,
        spans={n: SpanAttributes(characters=(), tokens=tuple(at)) for n, at in spans.items()},
    )
    return xr.Dataset(
        {"attention_mean": (("layer", "query", "key"), row[:, None].astype(np.float32))},
        coords={
            "layer": np.arange(1, layers + 1),
            "query": [tokens - 1],
            "key": np.arange(tokens),
            "token_id": ("key", ids.astype(np.uint32)),
        },
        attrs=attributes.model_dump(mode="json"),
    )


def any_layer(**options: Any) -> Callable[[int], bool]:
    """Return a draw that tells whether any layer of any span has q ≤ 0.05."""
    return lambda seed: bool(
        (analysis.critical_layers(word_run(seed, **options), seed=seed)["q"] <= 0.05).any()
    )


def planted_layer(**options: Any) -> Callable[[int], bool]:
    """Return a draw that tells whether the planted layer is critical."""

    def draw(seed: int) -> bool:
        found = analysis.critical_layers(word_run(seed, **options), ["first"], seed=seed)
        return bool(found["critical"].sel(source="first", layer=3))

    return draw


# --- the demo ----------------------------------------------------------------------------------


@functools.cache
def demo_run() -> xr.DataTree:
    """Return mean attention of the embedded model over its ten scenarios, loaded."""
    from zarrtrace.extraction import Options, extract_run  # imports torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        extract_run(path, Options(features=False), progress="off")
        return loaded(path)


def loaded(path: Path) -> xr.DataTree:
    """Return a run's mean attention, loaded."""
    import zarrtrace as zt

    run = zt.open_run(path)
    traces = {
        name: child.to_dataset()[["attention_mean"]].load() for name, child in run.children.items()
    }
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=run.attrs), **traces})


def placebo_word(seed: int) -> bool:
    """Tell whether a random group of one to three tokens of the demo's template stands out."""
    rng = np.random.default_rng(seed)
    run = demo_run()
    # Up to the history of spins, all scenarios have the same words at the same places.
    taken = {at for one in ("probability", "goal", "balance") for at in positions(run, one)}
    while True:
        size = rng.integers(1, 4)
        tokens = range(start := int(rng.integers(1, 52 - size)), start + size)
        if not taken & {*tokens}:
            break
    return bool((with_placebo(run, list(tokens))["q"] <= 0.05).any())


def positions(run: xr.DataTree, name: str) -> list[int]:
    first = next(iter(run.children.values()))
    return list(first.attrs["spans"][name]["tokens"])


def with_placebo(run: xr.DataTree, tokens: Sequence[int]) -> xr.Dataset:
    """Test tokens, which are in no span, as a further span of all scenarios."""
    traces = {}
    for name, child in run.children.items():
        ds = child.to_dataset()
        placebo = {"characters": [], "tokens": list(tokens)}
        traces[name] = ds.assign_attrs(spans={**ds.attrs["spans"], "placebo": placebo})
    return analysis.critical_layers(planted.as_run(traces), ["placebo"])


# --- bands of layers ---------------------------------------------------------------------------

BANDS = {"local": (1, 10), "task": (11, 20), "decision": (21, 31)}
HYPOTHESES = tuple(BANDS)
_AT = np.arange(31)


def shuffled_demo(rng: np.random.Generator) -> np.ndarray:
    """Return the demo's measures, each with its layers shuffled."""
    values = demo_measures().copy()
    for one in values:  # all scenarios of a measure in one order
        one[:] = one[:, rng.permutation(one.shape[1])]
    return values


@functools.cache
def demo_measures() -> np.ndarray:
    found = analysis.layer_bands(demo_run(), BANDS, task_spans=["balance", "goal", "probability"])
    return np.asarray(found["value"].values)


def smooth(covariance: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
    """Return a draw of measures of ten scenarios around one profile of this covariance."""
    root = np.linalg.cholesky(covariance + 1e-6 * np.eye(len(covariance)))

    def draw(rng: np.random.Generator) -> np.ndarray:
        profile = root @ rng.normal(size=(3, len(root), 1))
        return np.asarray(profile[:, None, :, 0] + 0.1 * rng.normal(size=(3, 10, len(root))))

    return draw


AUTOREGRESSIVE = 0.8 ** np.abs(_AT[:, None] - _AT)
BUMPS = np.exp(-(((_AT[:, None] - _AT) / 4) ** 2) / 2)
WALK = 1.0 + np.minimum(_AT[:, None], _AT)


def supported(
    measures: Callable[[np.random.Generator], np.ndarray], step: float = 0.0
) -> Callable[[int], bool]:
    """Return a draw that tells whether a hypothesis is supported, each of the three by turns.

    Parameters
    ----------
    measures
        Draws them, ``(hypothesis, scenario, layer)``.
    step
        How much higher the measure is in the hypothesised band.
    """

    def draw(seed: int) -> bool:
        values = measures(np.random.default_rng(seed))
        name = HYPOTHESES[seed % len(HYPOTHESES)]
        first, last = BANDS[name]
        values[HYPOTHESES.index(name), :, first - 1 : last] += step
        array = xr.DataArray(
            values,
            {"hypothesis": list(BANDS), "layer": _AT + 1},
            ("hypothesis", "scenario", "layer"),
        )
        found = evaluate(array, BANDS, resamples=499, seed=seed)
        return bool(found["supported"].sel(hypothesis=name))

    return draw


_PROFILES = (
    ("the demo's layers, shuffled", shuffled_demo),
    ("smooth profiles (autoregressive, 0.8 a layer)", smooth(AUTOREGRESSIVE)),
    ("smoother ones (Gaussian, 4 layers wide)", smooth(BUMPS)),
    ("random walks over layers", smooth(WALK)),
)

#: All experiments of this module.
EXPERIMENTS = (
    Experiment(
        "critical_layers, any q", "6 scenarios of one template, words differ by SD 2×", any_layer()
    ),
    Experiment(
        "critical_layers, any q",
        "the same, heavy tails (t with 3 df), the same for all layers",
        any_layer(draw=heavy, common=0.9),
    ),
    Experiment("critical_layers, any q", "6 scenarios of 2 templates", any_layer(prompts=2)),
    Experiment("critical_layers, any q", "6 different prompts", any_layer(prompts=6)),
    Experiment("critical_layers, any q", "1 to 3 tokens of the demo as a span", placebo_word),
    Experiment(
        "critical_layers critical",
        "6 scenarios of one template; a span gets 16× in one layer",
        planted_layer(factor=16),
        None,
    ),
    Experiment(
        "critical_layers critical",
        "6 different prompts; a span gets 4× in one layer",
        planted_layer(prompts=6, factor=4),
        None,
    ),
    *(
        Experiment("layer_bands supported, a band", data, supported(draw))
        for data, draw in _PROFILES
    ),
    Experiment(
        "layer_bands supported, a band",
        "autoregressive profiles, and 5 SD more in the band",
        supported(smooth(AUTOREGRESSIVE), step=5.0),
        None,
    ),
)
