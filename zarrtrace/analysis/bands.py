"""Whether bands of layers do what they are said to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import dask
import numpy as np
import xarray as xr

from zarrtrace.analysis.attention import attention_locality, attention_to
from zarrtrace.analysis.selecting import (
    Data,
    attention,
    described,
    has_span,
    is_run,
    per_scenario,
    positions,
    require_places,
    require_queries,
    span_names,
    stored_queries,
    taken,
    token_labels,
    traces,
)
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

#: First and last layer of each hypothesised band, for the 32 blocks of Llama-3.1-8B.
BANDS: Mapping[str, tuple[int, int]] = {
    "local": (1, 10),
    "task": (11, 20),
    "decision": (21, 31),
}
#: The spans that state the task.
TASK_SPANS = ("balance", "goal", "probability")

_MEASURES = {
    "local": "share of attention on the nearest tokens, the first token left out",
    "task": "attention to the task's spans from the tokens behind them, the decision left out",
    "decision": "attention of the decision to all spans",
}
_FEWEST = 4


def layer_bands(
    data: Data,
    bands: Mapping[str, tuple[int, int]] = BANDS,
    *,
    task_spans: Sequence[str] = TASK_SPANS,
    window: int = 5,
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
        they do not overlap.
    task_spans
        Names of the spans that state the task; a scenario may lack some of them.
    window
        Tokens.
    resamples, confidence, seed
        Of the bootstrap.

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
        - ``highest (hypothesis)``: the band where the measure is highest;
        - ``supported (hypothesis)`` bool: the interval lies above 0, and the band is the highest.

        The attribute ``findings`` says the same in words.

    Raises
    ------
    ConfigError
        If there are fewer than four scenarios, a band has no layer in any of them, or there is
        no attention, or only of the decision.
    ScenarioError
        If none of `task_spans` is in any scenario.

    Notes
    -----
    The interval is the bootstrap-t of Efron & Tibshirani (1993), chapter 12: scenarios are drawn
    with replacement, and the distribution of the studentised mean is inverted. It keeps its level
    for few scenarios better than percentiles do. On noise, an interval lies above 0 with
    probability (1 − `confidence`)/2. Scenarios made from one template are alike: the interval is
    about scenarios of this kind.
    """
    _check_bands(data, bands)
    present_spans = [name for name in task_spans if name in span_names(data)]
    require_places(data, present_spans or task_spans)
    values = _measure(data, present_spans, window)
    means = xr.concat(
        [
            values.sel(layer=[n for n in values["layer"].values if first <= n <= last]).mean(
                "layer"
            )
            for first, last in (bands[name] for name in _MEASURES)
        ],
        dim=xr.DataArray(list(_MEASURES), dims="band", name="band"),
    )
    _refuse_empty_bands(means, bands)
    out = xr.Dataset({"value": values, "band_mean": means.mean("scenario")})
    differences, rows = {}, {}
    for name in _MEASURES:
        own, others = means.sel(band=name), means.drop_sel(band=name)
        difference = (own - others.mean("band", skipna=False)).sel(hypothesis=name)
        differences[name] = difference
        rows[name] = _interval(difference.dropna("scenario").values, resamples, confidence, seed)
    hypothesis = xr.DataArray(list(_MEASURES), dims="hypothesis", name="hypothesis")
    out["difference"] = xr.concat(
        list(differences.values()), dim=hypothesis, coords="minimal", compat="override"
    )
    for field in ("estimate", "low", "high"):
        out[field] = ("hypothesis", [getattr(rows[name], field) for name in _MEASURES])
    out["highest"] = out["band_mean"].idxmax("band")
    out["supported"] = (out["low"] > 0) & (out["highest"] == out["hypothesis"])
    out = out.assign_attrs(findings=_findings(out, bands, confidence))
    return described(
        out,
        data,
        "layer_bands",
        "mean of a measure in the hypothesised band less the mean of its means in the other "
        "bands; bootstrap-t interval over scenarios (Efron & Tibshirani 1993)",
        bands={name: list(bands[name]) for name in _MEASURES},
        measures=_MEASURES,
        task_spans=present_spans,
        window=window,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )


def _check_bands(data: Data, bands: Mapping[str, tuple[int, int]]) -> None:
    number = len(traces(data)) if is_run(data) else 1
    if number < _FEWEST:
        raise ConfigError(
            f"layer_bands needs at least {_FEWEST} scenarios, and there "
            + ("is 1" if number == 1 else f"are {number}"),
            why="The interval is over scenarios.",
            remedy="Give a run with more scenarios; attention_locality and attention_to measure "
            "single ones.",
        )
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


def _refuse_empty_bands(means: xr.DataArray, bands: Mapping[str, tuple[int, int]]) -> None:
    usable = means.notnull().all("band").sum("scenario")
    for name in _MEASURES:
        if not bool(means.sel(band=name).notnull().any()):
            first, last = bands[name]
            raise ConfigError(
                f"band {name!r} (layers {first} to {last}) has no layer in any scenario",
                why="The default bands are for layers 1 to 31; the run has others, or they are "
                "missing.",
                remedy="Give bands= that fit the run's layers.",
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
    spans = [name for name in span_names(data) if name != DECISION]
    decided = attention_to(data, spans, reduce="sum").sum("source", min_count=1)
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
    keys = sorted({k for name in task_spans if has_span(ds, name) for k in positions(ds, name)})
    decided = set(positions(ds, DECISION))
    behind = [q for q in token_labels(ds).tolist() if keys and q > keys[-1] and q not in decided]
    if not behind:
        return None
    queries = [q for q in stored_queries(ds).tolist() if q in behind]
    if not queries:
        require_queries(ds, behind)
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


def _findings(out: xr.Dataset, bands: Mapping[str, tuple[int, int]], confidence: float) -> str:
    """Say in words what was found."""
    lines = []
    for name, measure in _MEASURES.items():
        one = out.sel(hypothesis=name)
        first, last = bands[name]
        verdict = "holds" if bool(one["supported"]) else "does not hold"
        means = ", ".join(f"{band} {float(one['band_mean'].sel(band=band)):.4f}" for band in bands)
        lines.append(
            f"{name} in layers {first}-{last} {verdict}: {measure} is {means} by band; difference "
            f"{float(one['estimate']):+.4f}, {confidence:.0%} interval {float(one['low']):+.4f} to "
            f"{float(one['high']):+.4f} over {int(one['difference'].notnull().sum())} scenarios; "
            f"highest in band {one['highest'].item()}."
        )
    return "\n".join(lines)
