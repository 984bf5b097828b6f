"""Whether bands of layers do what they are said to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise

import dask
import numpy as np
import xarray as xr

from zarrtrace.analysis.attention import attention_locality
from zarrtrace.analysis.positions import (
    has_span,
    positions,
    present,
    require_places,
    require_queries,
    span_names,
    spans_before,
    stored_queries,
    token_labels,
)
from zarrtrace.analysis.results import described, per_scenario
from zarrtrace.analysis.trace_arrays import attention, taken
from zarrtrace.analysis.traces import Data, independent, is_run, over_repeats, traces
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

_MEASURES = {
    "local": "share of attention on the nearest tokens, the first token left out",
    "task": "attention to the task's spans from the tokens behind them, the decision left out",
    "decision": "attention of the decision to all spans",
}
_FEWEST = 4
# Sums of the same numbers in another order differ by rounding, and must count as equal.
_TIE = 1e-9

#: First and last layer of each band, both included.
Bands = Mapping[str, Sequence[int]]


def layer_bands(
    data: Data,
    bands: Bands | None = None,
    *,
    task_spans: Sequence[str] | None = None,
    window: int = 5,
    alpha: float = 0.05,
    resamples: int = 9999,
    confidence: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Test whether attention is local, then task-related, then about the decision.

    Each hypothesis says of one measure that it is highest in one band of layers:

    - ``local``: share of attention within `window` tokens (:func:`attention_locality` of the mean
      over heads, the first token left out);
    - ``task``: attention that the tokens behind the last of `task_spans` pay to these spans
      together, the decision left out;
    - ``decision``: attention that the decision pays to all spans together.

    Parameters
    ----------
    data
        A run of at least four scenarios: they are the sample.
    bands
        First and last layer, both included, of the bands ``local``, ``task`` and ``decision``;
        they do not overlap. None takes those of the suite file that the run was made from.
    task_spans
        Names of the spans that state the task; a scenario may lack some of them. None takes those
        of the suite file, or else all spans but the decision.
    window
        Tokens.
    alpha
        Largest p of a supported hypothesis.
    resamples, confidence, seed
        Samples, level and seed of the bootstrap.

    Returns
    -------
    xr.Dataset
        Loaded, with `hypothesis` and `band` named as `bands`:

        - ``value (hypothesis, scenario, layer)``: the measure itself;
        - ``band_mean (hypothesis, band)``: its mean over layers, then scenarios;
        - ``difference (hypothesis, scenario)``: its mean in the hypothesised band less the mean
          of the means in the other bands;
        - ``estimate``, ``low``, ``high (hypothesis)``: mean difference over scenarios and its
          interval;
        - ``p``, ``smallest_p (hypothesis)``: one-sided p of the mean over scenarios among all
          places of the bands, and the least that there can be;
        - ``highest (hypothesis)``: the band where the measure is highest;
        - ``supported (hypothesis)`` bool: the interval lies above 0, p ≤ `alpha`, and the band is
          the highest.

        The attribute ``findings`` says the same in words, ``limits`` how small p can be.

    Raises
    ------
    ConfigError
        If no bands are given and the run has none, there are fewer than four scenarios, a band has
        no layer in any of them, or there is no attention, or only of the decision.
    ScenarioError
        If none of `task_spans` is in any scenario.

    Notes
    -----
    Two nulls are rejected together. *The measure is equal in the bands*: the unit is the scenario,
    and the interval is the bootstrap-t of Efron & Tibshirani (1993), chapter 12, which keeps its
    level for few scenarios better than percentiles do. On noise it lies above 0 with probability
    (1 − `confidence`)/2. Scenarios of one model share its layers, and any two bands of one model
    differ a little, in all scenarios: the interval alone says nothing of bands.

    *The bands have nothing to do with the layers*: the unit is the place of the bands.
    Neighbouring layers resemble each other, so layers cannot be permuted freely. The bands
    slide along the layers as a whole, in their order and with their widths, and where the
    layers end they continue with their mirror image, so that no place has an edge that the
    others lack; n layers have 2n places. (This is the circular shift of Alexander-Bloch et al.
    2018, NeuroImage 178, on layers reflected at both ends.) The floor of p is 1/(2n), or 2/(2n)
    if the bands are their own mirror image, as the middle one of three equal ones is: with
    fewer than 10, or 20, layers nothing is supported. A measure that rises or falls steadily
    over all layers supports the last, or first, band.
    """
    _check_number(data)
    bands, task_spans = _of_suite(data, bands, task_spans)
    _check_bands(bands)
    present_spans = [name for name in task_spans if name in span_names(data)]
    require_places(data, present_spans or task_spans)
    values = over_repeats(_measure(data, present_spans, window), data)
    values = values.transpose("hypothesis", "scenario", "layer")
    out = evaluate(
        values, bands, alpha=alpha, resamples=resamples, confidence=confidence, seed=seed
    )
    return described(
        out,
        data,
        "layer_bands",
        "mean of a measure in the hypothesised band less the mean of its means in the other "
        "bands; bootstrap-t interval over scenarios (Efron & Tibshirani 1993), and p over the "
        "places of the bands along the layers and their mirror image",
        bands={name: list(bands[name]) for name in _MEASURES},
        measures=_MEASURES,
        task_spans=present_spans,
        window=window,
        alpha=alpha,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )


def evaluate(
    values: xr.DataArray,
    bands: Bands,
    *,
    alpha: float = 0.05,
    resamples: int = 9999,
    confidence: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Test the hypotheses on their measures ``(hypothesis, scenario, layer)``."""
    layers = values["layer"].values
    means = xr.concat(
        [values.sel(layer=layers[_is_in(layers, bands[name])]).mean("layer") for name in _MEASURES],
        dim=xr.DataArray(list(_MEASURES), dims="band", name="band"),
    )
    _refuse_empty_bands(means, bands)
    out = xr.Dataset({"value": values, "band_mean": means.mean("scenario")})
    differences, rows = {}, {}
    for name in _MEASURES:
        own, others = means.sel(band=name), means.drop_sel(band=name)
        difference = (own - others.mean("band", skipna=False)).sel(hypothesis=name)
        differences[name] = difference
        interval = _interval(difference.dropna("scenario").values, resamples, confidence, seed)
        rows[name] = {**asdict(interval), **_of_places(values.sel(hypothesis=name), bands, name)}
    hypothesis = xr.DataArray(list(_MEASURES), dims="hypothesis", name="hypothesis")
    out["difference"] = xr.concat(
        list(differences.values()), dim=hypothesis, coords="minimal", compat="override"
    )
    for field in ("estimate", "low", "high", "p", "smallest_p"):
        out[field] = ("hypothesis", [rows[name][field] for name in _MEASURES])
    out["highest"] = out["band_mean"].idxmax("band")
    out["supported"] = (
        (out["low"] > 0) & (out["highest"] == out["hypothesis"]) & (out["p"] <= alpha)
    )
    return out.assign_attrs(
        findings=_findings(out, bands, confidence), limits=_limits(out, len(layers), alpha)
    )


def _of_suite(
    data: Data, bands: Bands | None, task_spans: Sequence[str] | None
) -> tuple[Bands, Sequence[str]]:
    """Return bands and spans of the task: those given, or else those of the run's suite file."""
    own = data.attrs if is_run(data) else {}
    bands = bands if bands is not None else own.get("bands")
    if bands is None:
        raise ConfigError(
            "no bands of layers are given",
            why="They are a hypothesis about one model, and the suite file of this run has none.",
            remedy="Give first and last layer of each: --band local=1-10 --band task=11-20 --band "
            "decision=21-31, in Python bands={'local': (1, 10), ...}, or 'bands:' in the suite "
            "file before the run is made.",
        )
    if task_spans is None:
        task_spans = own.get("task_spans") or spans_before(data, [DECISION])
    return bands, task_spans


def _check_number(data: Data) -> None:
    traces(data)  # says that a table has no attention
    number = len(set(independent(data)))
    if number < _FEWEST:
        raise ConfigError(
            f"layer_bands needs at least {_FEWEST} scenarios, and there "
            + ("is 1" if number == 1 else f"are {number}"),
            why="The interval is over scenarios.",
            remedy="Give a run with more scenarios; attention_locality and attention_to measure "
            "single ones.",
        )


def _check_bands(bands: Bands) -> None:
    if set(bands) != set(_MEASURES):
        raise ConfigError(
            f"bands are called {', '.join(map(repr, bands)) or 'nothing'}",
            why="Each band is tested for what its name says.",
            remedy="Give first and last layer of 'local', 'task' and 'decision'.",
        )
    ranges = sorted(tuple(bands[name]) for name in bands)
    if any(first > last for first, last in ranges) or any(
        before[1] >= after[0] for before, after in pairwise(ranges)
    ):
        raise ConfigError(
            f"bands {dict(bands)} are empty or overlap",
            remedy="Give first and last layer of each, both included.",
        )


def _refuse_empty_bands(means: xr.DataArray, bands: Bands) -> None:
    usable = means.notnull().all("band").sum("scenario")
    for name in _MEASURES:
        if not bool(means.sel(band=name).notnull().any()):
            first, last = bands[name]
            raise ConfigError(
                f"band {name!r} (layers {first} to {last}) has no layer in any scenario",
                why="The run has other layers, or they are missing.",
                remedy="Give bands that fit the run's layers.",
            )
    for name in _MEASURES:
        if int(usable.sel(hypothesis=name)) < _FEWEST:
            raise ConfigError(
                f"hypothesis {name!r}: only {int(usable.sel(hypothesis=name))} scenarios have "
                "what it needs in every band",
                why="Layers or spans are missing in the others.",
                remedy=f"At least {_FEWEST} are needed: complete the run.",
            )


# --- measures ----------------------------------------------------------------------------------


def _measure(data: Data, task_spans: Sequence[str], window: int) -> xr.DataArray:
    """Return the three measures ``(hypothesis, scenario, layer)``, loaded in one pass."""
    local = attention_locality(data, heads="mean", window=window, exclude_first=True)
    task = per_scenario(data, partial(_to_task, task_spans=task_spans))
    spans = spans_before(data, [DECISION])
    decided = per_scenario(data, partial(attention_of_decision, spans=spans))
    measures = [local["window_share"], task, decided]
    # One computation: dask reads each block once for all three.
    loaded = dask.compute(
        *[m.reset_coords(drop=True).drop_attrs().rename("value") for m in measures]
    )
    together: xr.DataArray = xr.concat(
        loaded,
        dim=xr.DataArray(list(_MEASURES), dims="hypothesis", name="hypothesis"),
        join="outer",
        coords="minimal",
        compat="override",
    )
    return together.transpose("hypothesis", "scenario", "layer")


def _to_task(ds: xr.Dataset, task_spans: Sequence[str]) -> xr.DataArray | None:
    """Return mean attention to the task's spans from the tokens behind them, by layer."""
    keys = _tokens_of(ds, task_spans)
    decided = set(positions(ds, DECISION))
    behind = [q for q in token_labels(ds).tolist() if keys and q > keys[-1] and q not in decided]
    if not behind:
        return None
    queries = [q for q in stored_queries(ds).tolist() if q in behind]
    if not queries:
        require_queries(ds, behind)
    chosen = taken(attention(ds, "mean"), query=queries, key=keys)
    return chosen.sum("key", skipna=False, dtype=np.float64).mean("query", skipna=False)


def _tokens_of(ds: xr.Dataset, spans: Sequence[str]) -> list[int]:
    """Return the positions of all tokens of some spans, each once."""
    return sorted({at for name in spans if has_span(ds, name) for at in positions(ds, name)})


def attention_of_decision(ds: xr.Dataset, spans: Sequence[str]) -> xr.DataArray | None:
    """Return the attention that the decision pays to all tokens of some spans, by layer.

    A token of several spans counts once.
    """
    keys = _tokens_of(ds, spans)
    if not keys or not present(ds, [DECISION]):
        return None
    queries = positions(ds, DECISION)
    require_queries(ds, queries)
    chosen = taken(attention(ds, "mean"), query=queries, key=keys)
    return chosen.sum("key", skipna=False, dtype=np.float64).mean("query", skipna=False)


# --- interval ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Interval:
    estimate: float
    low: float
    high: float


def _interval(values: np.ndarray, resamples: int, confidence: float, seed: int) -> _Interval:
    """Return the mean of `values` ``(n,)`` and its bootstrap-t interval."""
    n = len(values)
    estimate = float(values.mean())
    error = values.std(ddof=1) / np.sqrt(n)
    if np.ptp(values) == 0:
        return _Interval(estimate, estimate, estimate)
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(0, n, (resamples, n))]
    spread = drawn.std(1, ddof=1) / np.sqrt(n)
    varied = spread > 1e-9 * error  # a draw of one scenario n times says nothing of its error
    t = (drawn.mean(1)[varied] - estimate) / spread[varied]
    tail = (1 - confidence) / 2
    low, high = np.quantile(t, [tail, 1 - tail])
    return _Interval(estimate, estimate - high * error, estimate - low * error)


# --- places of the bands -----------------------------------------------------------------------


def _of_places(values: xr.DataArray, bands: Bands, name: str) -> dict[str, float]:
    """Return p of a hypothesis among all places of its bands, and the smallest there can be."""
    profile = values.mean("scenario").dropna("layer")
    layers = profile["layer"].values
    weights = np.zeros(len(layers))
    for band, limits in bands.items():
        is_in = _is_in(layers, limits)
        weights[is_in] = (1 if band == name else -1 / (len(bands) - 1)) / is_in.sum()
    found = places(weights) @ profile.values
    tie = _TIE * np.abs(weights) @ np.abs(profile.values)
    same = np.isclose(places(weights), weights, rtol=0, atol=_TIE).all(1)
    return {"p": float((found >= found[0] - tie).mean()), "smallest_p": float(same.mean())}


def places(weights: np.ndarray) -> np.ndarray:
    """Return the weights of layers with their bands at every place ``(place, layer)``.

    Parameters
    ----------
    weights
        ``(n,)``, in the order of the layers; place 0 of the 2n keeps them.
    """
    n = len(weights)
    reflected = np.concatenate([np.arange(n), np.arange(n)[::-1]])
    moved = np.zeros((2 * n, n))
    for shift in range(2 * n):
        np.add.at(moved[shift], np.roll(reflected, -shift)[:n], weights)
    return moved


def _is_in(layers: np.ndarray, limits: Sequence[int]) -> np.ndarray:
    first, last = limits
    return np.asarray((layers >= first) & (layers <= last))


# --- words -------------------------------------------------------------------------------------


def _findings(out: xr.Dataset, bands: Bands, confidence: float) -> str:
    """Say in words what was found."""
    held = [name for name in _MEASURES if bool(out["supported"].sel(hypothesis=name))]
    lines = [f"Supported: {', '.join(held) or 'none'} of the bands {', '.join(_MEASURES)}."]
    for name, measure in _MEASURES.items():
        one = out.sel(hypothesis=name)
        first, last = bands[name]
        verdict = "holds" if name in held else "does not hold"
        means = ", ".join(
            f"{band} {float(one['band_mean'].sel(band=band)):.4f}" for band in _MEASURES
        )
        lines.append(
            f"{name} in layers {first}-{last} {verdict}: {measure} is {means} by band; difference "
            f"{float(one['estimate']):+.4f}, {confidence:.0%} interval {float(one['low']):+.4f} to "
            f"{float(one['high']):+.4f} over {int(one['difference'].notnull().sum())} scenarios, "
            f"p = {float(one['p']):.2g} over places of the bands; highest in band "
            f"{one['highest'].item()}."
        )
    return "\n".join(lines)


def _limits(out: xr.Dataset, layers: int, alpha: float) -> str:
    """State the smallest p that this number of layers allows."""
    floors = {name: float(out["smallest_p"].sel(hypothesis=name)) for name in _MEASURES}
    text = f"{layers} layers are one sample: p can be no smaller than " + ", ".join(
        f"{floor:.2g} ({name})" for name, floor in floors.items()
    )
    never = [name for name, floor in floors.items() if floor > alpha]
    return text + (f", so {' and '.join(never)} cannot be supported." if never else ".")
