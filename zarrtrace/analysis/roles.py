"""Scores of the roles of attention heads."""

from __future__ import annotations

import numpy as np
import xarray as xr

from zarrtrace.analysis.parallel import some_layers
from zarrtrace.analysis.positions import stored_queries, token_labels
from zarrtrace.analysis.results import described, per_scenario
from zarrtrace.analysis.trace_arrays import attention, taken, token_ids
from zarrtrace.analysis.traces import Data

#: The scores of :func:`head_roles`.
ROLES = ("previous_token", "first_token", "duplicate_token", "induction")


def head_roles(data: Data) -> xr.DataArray:
    """Score every head for four roles.

    Parameters
    ----------
    data
        A trace or a run.

    Returns
    -------
    xr.DataArray
        ``([scenario,] role, layer, head)`` float64 from 0 to 1: the mean, over the queries where
        the role has something to attend to, of the attention that goes there.

        - ``previous_token``: the token before the query.
        - ``first_token``: the first token, over all other queries (an attention sink).
        - ``duplicate_token``: earlier occurrences of the query's own token.
        - ``induction``: the tokens right after earlier occurrences of the query's own token, the
          query itself left out.

        NaN for missing layers, for the last two where no token repeats, and all four of a head
        that holds NaN where any of them looks.

    Raises
    ------
    ConfigError
        If there is no attention.

    Notes
    -----
    The patterns are those of Olsson et al. (2022), *In-context Learning and Induction Heads*, and
    of TransformerLens's ``head_detector`` (with ``duplicate_token_head`` and ``induction_head``).
    They are usually measured on repeated random tokens; on natural prompts, where few tokens
    repeat, the last two say what a head does *here*, not what it is. A description of each
    scenario: no null hypothesis is tested.
    """
    out = per_scenario(data, _roles).rename("score")
    return described(
        out.assign_attrs(long_name="share of attention that fits the role", units="1"),
        data,
        "head_roles",
        "mean attention to the previous token, the first token, earlier copies of the token, and "
        "the tokens after these (Olsson et al. 2022)",
    )


def _roles(ds: xr.Dataset) -> xr.DataArray:
    """Return ``(role, layer, head)`` of one trace."""
    patterns = _patterns(ds).sel(query=stored_queries(ds))
    patterns = patterns.sel(query=patterns.any(["role", "key"]))
    counts = patterns.any("key").sum("query")
    array = taken(attention(ds, "each"), query=patterns["query"].values)
    found = _in_patterns(array, patterns) / counts.where(counts > 0)
    return found.transpose("role", "layer", "head")


def _in_patterns(array: xr.DataArray, patterns: xr.DataArray) -> xr.DataArray:
    """Sum attention ``(layer, head, query, key)`` over the keys that fit each role."""
    if array.chunks is not None:
        out: xr.DataArray = xr.dot(
            array.astype(np.float64), patterns.astype(np.float64), dim=["query", "key"]
        )
        return out
    query, key = np.nonzero(patterns.any("role").values)
    fits = patterns.values[:, query, key].T.astype(np.float64)
    sums = np.empty((*array.shape[:2], len(ROLES)))
    for start, layers in some_layers(array):
        found = layers[..., query, key].astype(np.float64) @ fits
        sums[start : start + len(layers)] = found
    labels = {dim: array.indexes[dim] for dim in ("layer", "head")}
    return xr.DataArray(sums, {**labels, "role": list(ROLES)}, ("layer", "head", "role"))


def _patterns(ds: xr.Dataset) -> xr.DataArray:
    """Return which keys fit each role, ``(role, query, key)`` bool."""
    ids, at = token_ids(ds, "Repeated tokens are found by their ids."), token_labels(ds)
    query, key = at[:, None], at[None, :]
    earlier = (ids[:, None] == ids[None, :]) & (key < query)
    after = np.zeros_like(earlier)
    after[:, 1:] = earlier[:, :-1]
    return xr.DataArray(
        np.stack(
            [key == query - 1, (key == at[0]) & (query > key), earlier, after & (key < query)]
        ),
        dims=("role", "query", "key"),
        coords={"role": list(ROLES), "query": at, "key": at},
    )
