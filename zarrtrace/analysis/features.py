"""Where SAE features are active: along layers, and on pathways that attention takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import xarray as xr

from zarrtrace.analysis.samples import Samples, samples
from zarrtrace.analysis.selecting import (
    Data,
    Place,
    as_places,
    attention,
    described,
    is_run,
    label,
    per_scenario,
    present,
    require,
    require_places,
    require_queries,
    scenario_names,
    stored_positions,
    taken,
    traces,
    whole,
)
from zarrtrace.analysis.tables import SAMPLE
from zarrtrace.errors import ConfigError
from zarrtrace.format.attributes import SAE_FIELDS, sae_coordinate
from zarrtrace.scenarios import DECISION
from zarrtrace.suggestions import did_you_mean

#: How the tokens of a place become one number.
Reduce = Literal["mean", "max", "none"]

# What is said of each feature on a pathway.
_ON_PATHWAY = ("feature", "score", "source_activation", "target_activation")


_DataT = TypeVar("_DataT", xr.Dataset, xr.DataTree)


def of_sae(data: _DataT, name: str) -> _DataT:
    """Return the data with another SAE's features as ``features``, for what else is here.

    Where layers have several SAEs, the analyses look at ``features``, the first one's;
    ``of_sae(run, "mlp_out")`` puts ``features_mlp_out`` and its index of strongest features there.

    Parameters
    ----------
    data
        A trace, a run or a table.
    name
        What stands behind ``features_``.

    Returns
    -------
    xr.Dataset or xr.DataTree
        Like `data`; nothing is read.

    Raises
    ------
    ConfigError
        If a trace has no such features.
    """
    if isinstance(data, xr.DataTree) and is_run(data):
        children = {child: of_sae(ds, name) for child, ds in traces(data).items()}
        return xr.DataTree.from_dict({"/": data.to_dataset(), **children}, name=data.name)
    ds = data.to_dataset() if isinstance(data, xr.DataTree) else data
    variable = f"features_{name}"
    if variable not in ds:
        have = [str(n) for n in ds.data_vars if str(n).startswith("features")]
        raise ConfigError(
            f"the {ds.attrs.get('kind', 'trace')} has no {variable!r}",
            why="An SAE's name is what stands behind 'features_'; without one, the first SAE's "
            "features are taken.",
            remedy=did_you_mean(
                name,
                [one.removeprefix("features_") for one in have if one != "features"],
                label="Names there are",
            ),
        )
    rest: xr.Dataset = ds.drop_dims(["feature", "feature_rank"], errors="ignore")
    of_layers: list[str] = [sae_coordinate(field, "features") for field in SAE_FIELDS]
    rest = rest.drop_vars(of_layers, errors="ignore")
    names = ("features", "top_feature", "top_activation", "feature", "feature_rank", *of_layers)
    there: set[Any] = {*rest.variables, *rest.dims}
    renamed = rest.rename({f"{n}_{name}": n for n in names if f"{n}_{name}" in there})
    sae = ds.attrs.get("saes", {}).get(variable)
    out = renamed.assign_attrs(saes={"features": sae} if sae else {})
    return xr.DataTree(out, name=data.name) if isinstance(data, xr.DataTree) else out


def feature_trajectory(
    data: Data,
    features: int | Sequence[int],
    at: Place | Sequence[Place] = DECISION,
    *,
    reduce: Reduce = "mean",
) -> xr.DataArray:
    """Activation of given features, layer by layer.

    Latent 14826 of one layer's SAE and latent 14826 of another's are two unrelated features: a
    trajectory follows an index through dictionaries that were trained apart.

    Parameters
    ----------
    data
        A trace, a run or a table with ``features``.
    features
        One latent index, or several.
    at
        A place, or several: a span's name, a position (negative from the end) or positions.
    reduce
        What to make of a place's tokens: their ``"mean"``, their ``"max"`` (the activation of
        largest magnitude, with its sign), or ``"none"``: keep each one (then `at` is a single
        place).

    Returns
    -------
    xr.DataArray
        ``(scenario, layer, place, feature)`` float32, in the SAE's units; without ``scenario`` for
        a trace, without ``place`` or ``feature`` if a single one was given. With ``reduce="none"``
        ``query`` stands in place of ``place`` (token texts beside it for a trace: scenarios of a
        run differ in them), in the order of the prompt. NaN where a scenario lacks the span or the
        layer. Lazy if `data` is; reads only the chunks that hold these features and tokens.

    Raises
    ------
    ConfigError
        If a trace has no features, or no such feature.
    ScenarioError
        If no scenario has the span, or a position is outside the prompt.

    Notes
    -----
    With one feature at the last token this is ``features[-1, 14826]`` by layer.
    """
    places, several = as_places(at)
    if reduce == "none" and len(places) != 1:
        raise ConfigError(
            "reduce='none' takes one place",
            why="Tokens of several places are not one axis.",
            remedy="Give one span (or list of positions) at a time.",
        )
    one_feature = isinstance(features, int | np.integer)
    wanted = [int(features)] if one_feature else [int(f) for f in features]  # type: ignore[union-attr,arg-type]

    found = samples(data, places, ["features"], ["query_token"])
    chosen = _choose_features(found.arrays, wanted)
    if reduce == "none":
        query = np.unique(found.position)
        rows = [np.flatnonzero(found.position == position) for position in query]
        out = _by_place(data, chosen, found._replace(rows=rows), query.tolist(), "mean")
        out = out.assign_coords(place=query).rename(place="query")
    else:
        out = _by_place(data, chosen, found, places, reduce)
        out = out if several else out.isel(place=0)
    if not is_run(data):
        out = out.isel(scenario=0)
        if reduce == "none" and "query_token" in found.arrays:
            out = out.assign_coords(query_token=("query", found.arrays["query_token"].data))
    out = out.rename("activation")
    if one_feature:
        out = out.isel(feature=0)
    out = out.assign_attrs(long_name="SAE feature activation")
    return described(
        out,
        data,
        "feature_trajectory",
        "activation of one latent index by layer"
        + ("" if reduce == "none" else f", {reduce} over the place's tokens"),
        features=wanted,
        at=[label(place) for place in places],
        reduce=reduce,
    )


def _choose_features(arrays: xr.Dataset, wanted: Sequence[int]) -> xr.DataArray:
    """Return ``(layer, sample, feature)`` of given features, unread."""
    index = arrays.indexes["feature"]
    absent = [feature for feature in wanted if feature not in index]
    if absent or not wanted:
        raise ConfigError(
            f"no feature {absent[0]}" if absent else "no features were given",
            why=f"The SAE has latents {index.min()} to {index.max()}.",
            remedy="Give indices of these.",
        )
    return taken(arrays["features"].reset_coords(drop=True), feature=wanted)


def _by_place(
    data: Data, chosen: xr.DataArray, found: Samples, places: Sequence[Place], reduce: Reduce
) -> xr.DataArray:
    """Return ``(scenario, layer, place, feature)``."""
    names = scenario_names(data)
    cells = [
        (number, place, rows)
        for place, at in enumerate(found.rows)
        for number, rows in _equally_many(found.of_scenario, at)
    ]
    out: xr.DataArray = xr.apply_ufunc(
        _reduced_by_place,
        whole(chosen, SAMPLE, "feature"),
        kwargs={"cells": cells, "shape": (len(names), len(places)), "reduce": reduce},
        input_core_dims=[[SAMPLE, "feature"]],
        output_core_dims=[["scenario", "place", "feature"]],
        output_dtypes=[chosen.dtype],
        exclude_dims={"feature"},
        dask="parallelized",
        dask_gufunc_kwargs={
            "output_sizes": {
                "scenario": len(names),
                "place": len(places),
                "feature": chosen.sizes["feature"],
            }
        },
        keep_attrs=True,
    )
    return out.assign_coords(
        scenario=np.array(names, object),
        place=[label(place) for place in places],
        feature=chosen.indexes["feature"],
    ).transpose("scenario", "layer", "place", "feature")


def _equally_many(of_scenario: np.ndarray, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Group scenarios by how many samples they have of a place: numbers, ``(n, samples)``."""
    numbers, starts, counts = np.unique(of_scenario[rows], return_index=True, return_counts=True)
    return [
        (numbers[counts == n], rows[starts[counts == n][:, None] + np.arange(n)])
        for n in np.unique(counts)
    ]


def _reduced_by_place(
    values: np.ndarray,
    *,
    cells: Sequence[tuple[np.ndarray, int, np.ndarray]],
    shape: tuple[int, int],
    reduce: Reduce,
) -> np.ndarray:
    """``(…, sample, f)`` → ``(…, scenario, place, f)``; NaN where a scenario has not the place."""
    out = np.full((*values.shape[:-2], *shape, values.shape[-1]), np.nan, values.dtype)
    for numbers, place, rows in cells:
        here = values[..., rows, :]
        if reduce == "mean":
            out[..., numbers, place, :] = here.mean(-2)
        else:
            largest, smallest = here.max(-2), here.min(-2)
            out[..., numbers, place, :] = np.where(-smallest > largest, smallest, largest)
    return out


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
        How many features to keep by layer.

    Returns
    -------
    xr.Dataset
        ``feature`` (int64, −1 where fewer are active), ``score``, ``source_activation``,
        ``target_activation`` (means over tokens; NaN where fewer), ``(scenario, layer, rank)``; and
        ``attention (scenario, layer)``, the mean from target to source. Without ``scenario`` for a
        trace. Ties go to the lower index. Lazy if `data` is; reads the rows of the two places only:
        the stored index of 32 features a token would miss weaker ones.

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
    OV circuit, which a trace does not hold.
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
    strongest = xr.apply_ufunc(
        _strongest_on_pathway,
        whole(of_both, "query", "feature"),
        whole(weights.rename(query="target", key="source"), "target", "source"),
        kwargs={
            "source": np.searchsorted(rows, src),
            "target": np.searchsorted(rows, dst),
            "top": top,
        },
        input_core_dims=[["query", "feature"], ["target", "source"]],
        output_core_dims=[["value", "rank"]],
        output_dtypes=[np.float64],
        dask="parallelized",
        dask_gufunc_kwargs={"output_sizes": {"value": len(_ON_PATHWAY), "rank": top}},
        keep_attrs=False,
    )
    # Little enough to be one block, which makes graphs small.
    out = xr.Dataset({"strongest": whole(strongest, "layer")})
    out["attention"] = weights.mean(["query", "key"], skipna=False)
    return out.assign_coords(rank=np.arange(1, top + 1))


def _strongest_on_pathway(
    rows: np.ndarray,
    attention: np.ndarray,
    *,
    source: np.ndarray,
    target: np.ndarray,
    top: int,
) -> np.ndarray:
    """``(…, row, f), (…, q, k)`` and which rows are k and q → ``(…, value, top)``."""
    activations = np.take(rows, source, axis=-2)
    at_source = activations.mean(-2, dtype=np.float64)
    at_target = np.take(rows, target, axis=-2).mean(-2, dtype=np.float64)
    carried = np.einsum("...qk,...kf->...f", attention, activations, dtype=np.float64)
    carried = np.where(at_target != 0, carried / attention.shape[-2], 0)
    out = np.full((*carried.shape[:-1], len(_ON_PATHWAY), top), np.nan)
    out[..., 0, :] = -1
    for where in np.ndindex(carried.shape[:-1]):
        order = strongest(np.abs(carried[where]), top)
        values = (order, *(of[where][order] for of in (carried, at_source, at_target)))
        out[where][:, : len(order)] = values
    return out


def strongest(scores: np.ndarray, top: int) -> np.ndarray:
    """Indices of the `top` scores above 0, strongest first, ties to the lower index."""
    candidates = np.flatnonzero(scores > 0)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:top]]


def at_least_one(top: int) -> None:
    """Refuse to keep nothing."""
    if top < 1:
        raise ConfigError(f"top={top} keeps nothing", remedy="Give a number of at least 1.")
