"""Where single SAE features are active, and the features of another SAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal, TypeVar

import numpy as np
import xarray as xr

from zarrtrace.analysis.positions import Place, as_places, label
from zarrtrace.analysis.results import described
from zarrtrace.analysis.samples import Samples, samples
from zarrtrace.analysis.tables import SAMPLE, is_table
from zarrtrace.analysis.trace_arrays import taken, whole
from zarrtrace.analysis.traces import Data, is_run, scenario_names, traces
from zarrtrace.errors import ConfigError
from zarrtrace.format.attributes import SAE_FIELDS, sae_coordinate
from zarrtrace.scenarios import DECISION
from zarrtrace.suggestions import did_you_mean

#: A layer and the index of a feature of its SAE; an index alone where all layers share one SAE.
Feature = tuple[int, int] | int
#: How the tokens of a place become one number.
Reduce = Literal["mean", "max", "none"]


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
        Suffix behind ``features_``.

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
    features: Feature | Sequence[Feature],
    at: Place | Sequence[Place] = DECISION,
    *,
    reduce: Reduce = "mean",
) -> xr.DataArray:
    """Activation of given features, each a pair of a layer and an index.

    Feature 250 of one layer's SAE and feature 250 of another's are two unrelated features, because
    dictionaries are trained apart. An index without a layer is refused, unless one SAE serves all
    layers: then it means that feature in each of them.

    Parameters
    ----------
    data
        A trace, a run or a table with ``features``.
    features
        A pair, as ``(25, 250)``, or a list of pairs. Where all layers share one SAE, also an index
        or a list of indexes.
    at
        A place, or several: a span's name, a position (negative from the end) or positions.
    reduce
        How to reduce a place's tokens: their ``"mean"``, their ``"max"`` (the activation of
        largest magnitude, with its sign), or ``"none"``: keep each one (then `at` is a single
        place).

    Returns
    -------
    xr.DataArray
        ``(scenario, place, pair)`` float32, in the SAE's units; without ``scenario`` for a trace,
        without ``place`` or ``pair`` if a single one was given. Along ``pair`` stand the
        coordinates ``layer``, ``feature`` and, of several pairs, ``dictionary``, which names the
        SAE: equal where layers share one, empty if not known. With ``reduce="none"`` ``query``
        stands in place of ``place`` (token texts beside it for a trace: scenarios of a run differ
        in them), in the order of the prompt. NaN where a scenario lacks the span or the layer.
        Lazy if `data` is; reads only the chunks that hold these features and tokens.

    Raises
    ------
    ConfigError
        If a trace has no features, no such layer or feature, or an index comes without a layer
        and SAEs are unrelated.
    ScenarioError
        If no scenario has the span, or a position is outside the prompt.

    Notes
    -----
    The pair (25, 250) at the last token is ``features[-1, 250]`` of layer 25. This describes each
    scenario: there is no test.

    Examples
    --------
    >>> feature_trajectory(run, [(25, 250), (14, 7)])
    """
    places, several = as_places(at)
    if reduce == "none" and len(places) != 1:
        raise ConfigError(
            "reduce='none' takes one place",
            why="Tokens of several places are not one axis.",
            remedy="Give one span (or list of positions) at a time.",
        )
    found = samples(data, places, ["features"], ["query_token"])
    array = found.arrays["features"].reset_coords(drop=True)
    one_pair = _is_pair(features)
    # Which SAEs are shared is read only where it matters.
    dictionaries = {} if one_pair else dictionaries_of(data)
    pairs = as_pairs(features, array, dictionaries)
    if reduce == "none":
        query = np.unique(found.position)
        rows = [np.flatnonzero(found.position == position) for position in query]
        out = _of_pairs(data, array, pairs, found._replace(rows=rows), query.tolist(), "mean")
        out = out.assign_coords(place=query).rename(place="query")
    else:
        out = _of_pairs(data, array, pairs, found, places, reduce)
        out = out if several else out.isel(place=0)
    if not one_pair:
        texts = np.array([dictionaries.get(layer, "") for layer, _ in pairs], object)
        out = out.assign_coords(dictionary=("pair", texts))
    if not is_run(data):
        out = out.isel(scenario=0)
        if reduce == "none" and "query_token" in found.arrays:
            out = out.assign_coords(query_token=("query", found.arrays["query_token"].data))
    out = out.isel(pair=0) if one_pair else out
    return described(
        out.rename("activation").assign_attrs(long_name="SAE feature activation"),
        data,
        "feature_trajectory",
        "activation of single features"
        + ("" if reduce == "none" else f", {reduce} over the place's tokens"),
        features=pairs,
        at=[label(place) for place in places],
        reduce=reduce,
    )


def dictionaries_of(data: Data) -> dict[int, str]:
    """Return a text for each layer that names its SAE; layers with equal texts share one.

    Layers whose SAE is not known are left out.
    """
    found: dict[int, str] = {}
    for ds in [data] if is_table(data) else traces(data).values():
        fields = [sae_coordinate(field, "features") for field in ("id", "fingerprint")]
        known = [np.asarray(ds[name]) for name in fields if name in ds.coords]
        if not known or "layer" not in ds.indexes:
            continue
        for layer, *texts in zip(ds.indexes["layer"].tolist(), *known, strict=True):
            if any(texts):
                found.setdefault(layer, " ".join(str(text) for text in texts if text))
        if found.keys() >= set(ds.indexes["layer"]):
            break  # the traces of a run have the same SAEs
    return found


def as_pairs(
    given: Feature | Sequence[Feature], array: xr.DataArray, dictionaries: Mapping[int, str]
) -> list[tuple[int, int]]:
    """Return the pairs of layer and feature that were asked for.

    Parameters
    ----------
    given
        As :func:`feature_trajectory` takes them.
    array
        With the indexes ``layer`` and ``feature``.
    dictionaries
        A text for each layer that names its SAE.

    Raises
    ------
    ConfigError
        If there is no such pair, or an index comes without a layer and SAEs are unrelated.
    """
    alone = _is_pair(given) or _is_index(given)
    asked: list[Any] = [given] if alone else list(given)  # type: ignore[arg-type]
    layers, index = array.indexes["layer"], array.indexes["feature"]
    pairs: list[tuple[int, int]] = []
    for item in asked:
        if not _is_index(item):
            layer, feature = item
            pairs.append((int(layer), int(feature)))
            continue
        own = [dictionaries.get(int(layer), "") for layer in layers]
        if len(set(own)) > 1 or not all(own):
            raise ConfigError(
                f"feature {int(item)} of which layer?",
                why=f"Each layer has an SAE of its own: feature {int(item)} of one layer and "
                f"feature {int(item)} of another are unrelated.",
                remedy=f"Give pairs of layer and feature, as ({layers[-1]}, {int(item)}); on the "
                f"command line --feature {layers[-1]}:{int(item)}.",
            )
        pairs += [(int(layer), int(item)) for layer in layers]
    if not pairs:
        raise ConfigError("no features were given", remedy="Give pairs, as [(25, 250)].")
    for layer, feature in pairs:
        for what, wanted, known in (("layer", layer, layers), ("feature", feature, index)):
            if wanted not in known:
                raise ConfigError(
                    f"{layer}:{feature}: no {what} {wanted}",
                    why=f"The {what}s with features are {known.min()} to {known.max()}.",
                    remedy="Give the index of one of these.",
                )
    return pairs


def _is_pair(given: object) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(map(_is_index, given))


def _is_index(given: object) -> bool:
    return isinstance(given, int | np.integer)


def _of_pairs(
    data: Data,
    array: xr.DataArray,
    pairs: Sequence[tuple[int, int]],
    found: Samples,
    places: Sequence[Place],
    reduce: Reduce,
) -> xr.DataArray:
    """Return ``(scenario, place, pair)``; layers with the same features are read at once."""
    by_layer: dict[int, list[int]] = {}
    for layer, feature in pairs:
        by_layer.setdefault(layer, []).append(feature)
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, features in by_layer.items():
        groups.setdefault(tuple(sorted(set(features))), []).append(layer)
    parts, order = [], []
    for chosen, layers in groups.items():
        part = _by_place(data, taken(array, layer=layers, feature=chosen), found, places, reduce)
        flat = part.stack(pair=("layer", "feature"), create_index=False)
        parts.append(flat.drop_vars(["layer", "feature"], errors="ignore"))
        order += list(product(layers, chosen))
    out = xr.concat(parts, "pair").isel(pair=[order.index(pair) for pair in pairs])
    layer, feature = np.array(pairs, np.int64).T
    return out.assign_coords(layer=("pair", layer), feature=("pair", feature))


def _by_place(
    data: Data, chosen: xr.DataArray, found: Samples, places: Sequence[Place], reduce: Reduce
) -> xr.DataArray:
    """Return ``(scenario, place, layer, feature)``."""
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
        output_dtypes=[np.promote_types(chosen.dtype, np.float32)],
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
    ).transpose("scenario", "place", "layer", "feature")


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
    kind = np.promote_types(values.dtype, np.float32)  # a mean in float16 is off in its 4th digit
    out = np.full((*values.shape[:-2], *shape, values.shape[-1]), np.nan, kind)
    for numbers, place, rows in cells:
        here = values[..., rows, :].astype(kind, copy=False)
        if reduce == "mean":
            out[..., numbers, place, :] = here.mean(-2)
        else:
            largest, smallest = here.max(-2), here.min(-2)
            out[..., numbers, place, :] = np.where(-smallest > largest, smallest, largest)
    return out
