"""Features on the pathways that attention takes."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from zarrtrace.analysis.gaps import missing_layers
from zarrtrace.analysis.positions import (
    Place,
    label,
    present,
    require_places,
    require_queries,
    stored_positions,
)
from zarrtrace.analysis.results import described, per_scenario
from zarrtrace.analysis.trace_arrays import attention, require, taken, whole
from zarrtrace.analysis.traces import Data
from zarrtrace.errors import ConfigError
from zarrtrace.format.attributes import SAE_FIELDS, sae_coordinate
from zarrtrace.scenarios import DECISION

# Coordinates of each feature on a pathway.
_ON_PATHWAY = ("feature", "score", "source_activation", "target_activation")


def _activations(ds: xr.Dataset) -> xr.DataArray:
    """Return a trace's features without what is said of each layer's SAE, unloaded."""
    of_layers = [sae_coordinate(field, "features") for field in SAE_FIELDS]
    return ds["features"].drop_vars(of_layers, errors="ignore")


def pathway_features(
    data: Data,
    source: Place,
    target: Place = DECISION,
    *,
    top: int = 10,
) -> xr.Dataset:
    """Features active both at a source and at a target that attends to it, strongest first.

    A feature's score at one layer is the activation that attention can carry: over the tokens q of
    the target, the mean of ``Σ_k attention[q, k] · activation[k, f]`` with k over the tokens of the
    source and attention the mean over heads. Features that are not active at the target score
    nothing. Some SAEs (AbsTopK) have negative activations: the strongest score is that of largest
    magnitude, with its sign. Attention of block N reads the output of block N−1, while its SAE sees
    the output of block N: the score compares places within one layer, it does not trace a cause.

    Parameters
    ----------
    data
        A trace or a run with ``features`` and ``attention_mean``.
    source, target
        Spans or positions: attention goes from the target (query) to the source (key).
    top
        Number of features to keep by layer.

    Returns
    -------
    xr.Dataset
        ``feature`` (int64, −1 where fewer are active), ``score``, ``source_activation``,
        ``target_activation`` (means over tokens; NaN where fewer), ``(scenario, layer, rank)``;
        ``attention (scenario, layer)``, the mean from target to source; and ``features_nan
        (scenario, layer)``, how many features are left out because the model computed NaN. Without
        ``scenario`` for a trace. Layers are those that have features and attention. Ties go to the
        lower index. Lazy if `data` is; reads the rows of the two places only: the stored index of
        32 features a token would miss weaker ones.

    Raises
    ------
    ConfigError
        If a trace lacks features, attention or the target's rows of it, or `top` is below 1.
    ScenarioError
        If no scenario has both spans.

    Notes
    -----
    Scoring by activation × attention follows the attribution of attention-mediated paths in
    Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", without the
    OV circuit, which a trace does not hold. A ranking of each scenario's features always has a
    first one: no null hypothesis is tested.
    """
    at_least_one(top)
    require_places(data, [source, target])

    of = partial(_on_pathway, source=source, target=target, top=top)
    both = per_scenario(data, of)
    out = xr.Dataset(
        {name: both["strongest"].isel(value=at) for at, name in enumerate(_ON_PATHWAY)}
    )
    out["attention"] = both["attention"]
    out["feature"] = out["feature"].fillna(-1).astype(np.int64)
    unknown = both["strongest"].isel(value=len(_ON_PATHWAY), rank=0, drop=True)
    out["features_nan"] = unknown.fillna(0).astype(np.int64)
    return described(
        out,
        data,
        "pathway_features",
        "activation at the source weighted by the target's attention to it (mean over heads), for "
        "features active at both",
        source=label(source),
        target=label(target),
        top=top,
    )


def _on_pathway(ds: xr.Dataset, source: Place, target: Place, top: int) -> xr.Dataset | None:
    """Return what :func:`pathway_features` says of one trace."""
    require(ds, "features", "attention_mean")
    if len(present(ds, [source, target])) < 2:
        return None
    src, dst = stored_positions(ds, source), stored_positions(ds, target)
    require_queries(ds, dst)
    rows = np.unique([*src, *dst])
    activations = _activations(ds).drop_vars("query_token", errors="ignore")
    of_both = taken(activations, query=rows).drop_vars("query")
    weights = taken(attention(ds, "mean"), query=dst, key=src).drop_vars(["query", "key"])
    weights = weights.rename(query="target", key="source")
    # Blocks without attention have features, and the other way round.
    of_both, weights = xr.align(of_both, weights, join="inner")
    strongest = xr.apply_ufunc(
        _strongest_on_pathway,
        whole(of_both, "query", "feature"),
        whole(weights, "target", "source"),
        kwargs={
            "source": np.searchsorted(rows, src),
            "target": np.searchsorted(rows, dst),
            "top": top,
        },
        input_core_dims=[["query", "feature"], ["target", "source"]],
        output_core_dims=[["value", "rank"]],
        output_dtypes=[np.float64],
        dask="parallelized",
        dask_gufunc_kwargs={"output_sizes": {"value": len(_ON_PATHWAY) + 1, "rank": top}},
        keep_attrs=False,
    )
    # Little enough to be one block, which makes graphs small.
    out = xr.Dataset({"strongest": whole(strongest, "layer")})
    # All of a missing layer is NaN, but the model has not computed it.
    is_stored = ~np.isin(out["layer"], list(missing_layers(ds)))
    out["strongest"] = out["strongest"].where(xr.DataArray(is_stored, dims="layer"))
    out["attention"] = weights.mean(["target", "source"], skipna=False)
    return out.assign_coords(rank=np.arange(1, top + 1))


def _strongest_on_pathway(
    rows: np.ndarray,
    attention: np.ndarray,
    *,
    source: np.ndarray,
    target: np.ndarray,
    top: int,
) -> np.ndarray:
    """``(…, row, f), (…, q, k)`` and which rows are k and q → ``(…, value, top)``.

    The last value, at the first rank, is the number of features whose score is NaN.
    """
    activations = np.take(rows, source, axis=-2)
    at_source = activations.mean(-2, dtype=np.float64)
    at_target = np.take(rows, target, axis=-2).mean(-2, dtype=np.float64)
    carried = np.einsum("...qk,...kf->...f", attention, activations, dtype=np.float64)
    carried = np.where(at_target != 0, carried / attention.shape[-2], 0)
    carried[np.isnan(at_target)] = np.nan
    out = np.full((*carried.shape[:-1], len(_ON_PATHWAY) + 1, top), np.nan)
    out[..., 0, :] = -1
    out[..., -1, 0] = np.isnan(carried).sum(-1)
    for where in np.ndindex(carried.shape[:-1]):
        order = strongest(np.abs(carried[where]), top)
        values = (order, *(of[where][order] for of in (carried, at_source, at_target)))
        out[where][: len(_ON_PATHWAY), : len(order)] = values
    return out


def strongest(scores: np.ndarray, top: int) -> np.ndarray:
    """Indices of the `top` scores above 0, strongest first, ties to the lower index."""
    candidates = np.flatnonzero(scores > 0)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:top]]


def at_least_one(top: int) -> None:
    """Refuse to keep nothing."""
    if top < 1:
        raise ConfigError(f"top={top} keeps nothing", remedy="Give a number of at least 1.")
