"""Features that fire at one kind of span and not elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import xarray as xr

from zarrtrace.analysis.features import at_least_one, strongest
from zarrtrace.analysis.selecting import (
    Data,
    described,
    has_span,
    positions,
    require,
    require_places,
    span_names,
    traces,
    whole,
)


def position_specific_features(
    data: Data,
    spans: Sequence[str] | None = None,
    *,
    threshold: float = 0.0,
    top: int = 10,
    min_scenarios: int = 1,
) -> xr.Dataset:
    """Features that fire at one kind of span and not elsewhere.

    A feature fires at a token if its activation is above `threshold`. Over the tokens of all
    scenarios, the score is the rate at the span minus the rate at all other tokens.

    Parameters
    ----------
    data
        A trace or a run with ``features``.
    spans
        Names of spans; all there are if None. A scenario without the span says nothing about it.
    threshold
        Activation above which a feature fires, in the SAE's units.
    top
        How many features to keep by span and layer.
    min_scenarios
        Keep only features that fire at the span in at least so many scenarios.

    Returns
    -------
    xr.Dataset
        ``(span, layer, rank)``, strongest first, ties to the lower index: ``feature`` (int64, −1
        where fewer score above 0), ``score``, ``rate_at`` (recall), ``rate_elsewhere``,
        ``precision`` (share of its firing tokens that lie in the span) and ``scenarios`` (in how
        many it fires there); and ``tokens_at``, ``tokens_elsewhere (span, layer)``. Computed at the
        call, scenario by scenario, one layer at a time (on dask-backed data one block a worker).
        Every activation counts, so it reads ``features`` whole and not the stored index of 32.

    Raises
    ------
    ConfigError
        If a trace has no features.
    ScenarioError
        If no scenario has one of `spans`.

    Notes
    -----
    The score is Youden's J (1950). Tokens of one prompt are not independent, so no p-value is
    given; `scenarios` says how often the finding repeats.
    """
    at_least_one(top)
    names = span_names(data) if spans is None else list(spans)
    require_places(data, names)
    runs = list(traces(data).values())
    for ds in runs:
        require(ds, "features")
    layers = np.unique(np.concatenate([np.asarray(ds["layer"]) for ds in runs]))
    width = max(ds.sizes["feature"] for ds in runs)
    # One scenario's counts at a time: they are as large as the result.
    total = _add_up((_firing(ds, names, threshold) for ds in runs), layers, width)
    fired, elsewhere = total["fired"], total["fired_all"] - total["fired"]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_at = fired / total["tokens"][..., None]
        rate_elsewhere = elsewhere / (total["tokens_all"] - total["tokens"])[..., None]
        precision = fired / total["fired_all"]
    score = np.where(total["scenarios"] >= min_scenarios, rate_at - rate_elsewhere, np.nan)
    shape = (*score.shape[:-1], top)
    feature = np.full(shape, -1, np.int64)
    columns = {
        "score": score,
        "rate_at": rate_at,
        "rate_elsewhere": rate_elsewhere,
        "precision": precision,
        "scenarios": total["scenarios"],
    }
    values = {name: np.full(shape, np.nan) for name in columns}
    for where in np.ndindex(shape[:-1]):
        order = strongest(score[where], top)
        feature[where][: len(order)] = order
        for name, of in columns.items():
            values[name][where][: len(order)] = of[where][order]
    values["scenarios"] = np.nan_to_num(values["scenarios"]).astype(np.int64)
    dims = ("span", "layer", "rank")
    out = xr.Dataset(
        {"feature": (dims, feature), **{name: (dims, value) for name, value in values.items()}},
        coords={"span": names, "layer": layers, "rank": np.arange(1, top + 1)},
    )
    out["tokens_at"] = (dims[:2], total["tokens"])
    out["tokens_elsewhere"] = (dims[:2], total["tokens_all"] - total["tokens"])
    return described(
        out,
        data,
        "position_specific_features",
        "rate of firing at the span's tokens minus the rate at all other tokens (Youden's J 1950)",
        spans=names,
        threshold=threshold,
        top=top,
        min_scenarios=min_scenarios,
    )


def _firing(ds: xr.Dataset, names: Sequence[str], threshold: float) -> dict[str, np.ndarray]:
    """Count, by span, layer and feature, the tokens at which a feature fires."""
    query = ds["query"].values
    rows = np.zeros((len(names) + 1, len(query)), np.float32)
    rows[-1] = 1
    for row, name in zip(rows, names, strict=False):
        if has_span(ds, name):
            row[np.isin(query, positions(ds, name))] = 1

    def count(block: np.ndarray) -> np.ndarray:
        counts = rows @ np.asarray(block > threshold, dtype=np.float32)
        return np.where(np.isnan(block[..., :1, :1]), np.nan, counts).astype(np.float32)

    counts = _by_layer(
        ds["features"], count, ["place", "feature"], [len(rows), ds.sizes["feature"]]
    )
    stored = ~np.isnan(counts[:, 0, 0])
    counts = np.nan_to_num(counts)
    spans, everywhere = counts[:, :-1].swapaxes(0, 1), counts[:, -1]
    has = np.asarray(rows[:-1].any(1))
    # A scenario without the span, or without the layer, counts neither here nor there.
    return {
        "layer": ds["layer"].values,
        "fired": spans.astype(np.int32),
        "fired_all": (has[:, None, None] * everywhere).astype(np.int32),
        "tokens": (rows[:-1].sum(1)[:, None] * stored).astype(np.int32),
        "tokens_all": (has[:, None] * len(query) * stored).astype(np.int32),
        "scenarios": (spans > 0).astype(np.int32),
    }


def _add_up(
    found: Iterable[dict[str, np.ndarray]], layers: np.ndarray, width: int
) -> dict[str, np.ndarray]:
    """Add up counts over scenarios, which may have different layers and sizes of SAE."""
    total: dict[str, np.ndarray] = {}
    for counts in found:
        at = np.searchsorted(layers, counts["layer"])
        for name, value in counts.items():
            if name == "layer":
                continue
            tail = (width,) if value.ndim == 3 else ()
            sums = total.setdefault(
                name, np.zeros((len(value), len(layers), *tail), dtype=np.int64)
            )
            if value.ndim == 3:
                sums[:, at, : value.shape[-1]] += value
            else:
                sums[:, at] += value
    return total


def _by_layer(
    array: xr.DataArray,
    function: Callable[[np.ndarray], np.ndarray],
    dims: Sequence[str],
    sizes: Sequence[int],
) -> np.ndarray:
    """Apply `function` to the whole of each layer and stack the results.

    Dask works on its own blocks in parallel; otherwise one layer at a time is in memory.

    Parameters
    ----------
    array
        ``(layer, query, …)``.
    function
        Takes ``(…, query, feature)``, returns ``(…, *dims)``.
    dims, sizes
        The result's dimensions after the layer.

    Returns
    -------
    np.ndarray
        ``(layer, *dims)``.
    """
    if array.chunks is None:
        return np.stack(
            [function(np.asarray(array.isel(layer=i).values)) for i in range(len(array))]
        )
    core = [str(dim) for dim in array.dims if dim != "layer"]
    bare = array.drop_vars([name for name in array.coords if name not in ("layer",)])
    return np.asarray(
        xr.apply_ufunc(
            function,
            whole(bare, *core),
            input_core_dims=[core],
            output_core_dims=[[f"out_{dim}" for dim in dims]],
            output_dtypes=[np.float32],
            dask="parallelized",
            dask_gufunc_kwargs={
                "output_sizes": {f"out_{d}": s for d, s in zip(dims, sizes, strict=True)}
            },
        ).values
    )
