"""Directions in a layer along which a target changes, as an array to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from zarrtrace.analysis.crossvalidation import Rows, require_sklearn, ridge_weights
from zarrtrace.analysis.layer_samples import probed_array, read_rows, samples_of
from zarrtrace.analysis.probes import DEFAULT_FEATURES
from zarrtrace.analysis.results import described
from zarrtrace.analysis.samples import At
from zarrtrace.analysis.targets import described_values, read_groups, read_target
from zarrtrace.analysis.traces import Data
from zarrtrace.errors import ConfigError

_METHODS = {
    "difference": "mean of the samples with the second value − mean of those with the first, "
    "divided by its length",
    "ridge": "weights of a ridge regression on standardised samples (Hoerl & Kennard 1970), the "
    "penalty chosen in 3 folds of groups, in the samples' own units, divided by their length",
}


def directions(
    samples: Data,
    target: str | xr.DataArray,
    *,
    what: str = "residual",
    layers: Sequence[int] | None = None,
    at: At | None = None,
    groups: str | None = None,
    method: Literal["difference", "ridge"] | None = None,
    n_features: int = DEFAULT_FEATURES,
) -> xr.Dataset:
    """Return one direction a layer along which a target changes, of length 1.

    Parameters
    ----------
    samples, target, what, layers, at
        As for :func:`probe`.
    groups
        For ridge: a column whose values are not divided to choose the penalty; the scenario if
        None.
    method
        ``"difference"`` of the means of two values, ``"ridge"`` for a number (of two values as 0
        and 1; needs scikit-learn). If None, the one that fits the target.
    n_features
        For ridge: features that are used, those active in most samples; the others have weight 0.

    Returns
    -------
    xr.Dataset
        ``direction (layer, channel)`` or ``(layer, feature)`` of length 1, ``norm (layer)`` the
        length that it had, and ``n_samples (layer)``. Their product is the difference of the means,
        or the ridge regression's weights: ``residual @ direction * norm + intercept``, with
        ``intercept (layer)``, predicts the target. NaN in a layer without samples of both values,
        or whose samples do not vary. ``to_netcdf`` and ``to_zarr`` write it.

    Raises
    ------
    ScenarioError
        If there is no such column.
    ConfigError
        If the array is missing, the target does not vary, or has more than two values and the
        method is ``"difference"``.

    Notes
    -----
    Describes the samples it was computed from, and tests nothing: there is no null hypothesis and
    no p. :func:`probe` says how well such a direction predicts other groups. With fewer samples
    than channels, much of a direction is noise.

    Examples
    --------
    >>> found = zt.analysis.directions(samples, samples.balance > 100)
    >>> along = xr.dot(samples.residual, found.direction, dim="channel")  # (layer, sample)
    """
    rows = samples_of(samples, at)
    array = probed_array(rows, what, layers)
    wanted = read_target(rows, target)
    chosen = method or ("difference" if wanted.classes else "ridge")
    _check_method(chosen, wanted.name, is_number=not wanted.classes)
    name, codes = read_groups(rows, groups)
    kept = np.isfinite(wanted.values) & (codes >= 0)
    found = []
    for layer in array.indexes["layer"]:
        x, used = read_rows(array.sel(layer=layer), kept)
        found.append(_direction(Rows(x, codes[used, None][:, :0], codes[used], n_features),
                                wanted.values[used], chosen))  # fmt: skip
    column = next(dim for dim in array.dims if dim not in ("layer", "sample"))
    weights = np.array([one[0] for one in found])
    norm = np.sqrt((weights**2).sum(1))
    unit = np.divide(weights, norm[:, None], out=np.full_like(weights, np.nan),
                     where=norm[:, None] > 0)  # fmt: skip
    out = xr.Dataset(
        {
            "direction": (("layer", column), unit),
            "norm": ("layer", norm),
            "n_samples": ("layer", [one[2] for one in found]),
        },
        {dim: array[dim].variable for dim in ("layer", column) if dim in array.coords},
    )
    if chosen == "ridge":
        out["intercept"] = ("layer", [one[1] for one in found])
    out = described(
        out, rows, "directions", _METHODS[chosen], what=what, at=rows.attrs.get("positions"),
        method=chosen, **({"groups": name, "n_features": n_features} if chosen == "ridge" else {}),
    )  # fmt: skip
    said = described_values(wanted, wanted.values[kept])
    return out.assign_attrs(said, findings=_findings(out, said, chosen))


def _check_method(method: str, name: str, *, is_number: bool) -> None:
    if method not in _METHODS:
        raise ConfigError(
            f"method={method!r} is neither 'difference' nor 'ridge'", remedy="Give one."
        )
    if method == "ridge":
        require_sklearn()
    elif is_number:
        raise ConfigError(
            f"the target {name!r} has more than two values",
            why="A difference of means needs two.",
            remedy=f"Give method='ridge', or two values: samples.{name} > 50.",
        )


def _direction(rows: Rows, y: np.ndarray, method: str) -> tuple[np.ndarray, float, int]:
    """Return weights ``(columns,)``, the intercept and the number of samples; NaN if undefined."""
    nothing = np.full(rows.x.shape[1], np.nan)
    if len(np.unique(y)) < 2:
        return nothing, float("nan"), len(y)
    if method == "ridge":
        if len(np.unique(rows.groups)) < 2:
            return nothing, float("nan"), len(y)
        return *ridge_weights(rows, y)[:2], len(y)
    return (
        _mean(rows.x[np.flatnonzero(y == 1)]) - _mean(rows.x[np.flatnonzero(y == 0)]),
        0.0,
        len(y),
    )


def _mean(x: Any) -> np.ndarray:
    return np.asarray(x.sum(0, dtype=np.float64)).ravel() / int(x.shape[0])


def _findings(out: xr.Dataset, said: dict[str, Any], method: str) -> str:
    """Say what the direction is of."""
    samples = int(out["n_samples"].max())
    if method == "difference":
        low, high = said["classes"]
        return f"From the mean of {said['target']} = {low} to that of {high}, {samples} samples."
    return f"Along it {said['target']} rises, in a ridge regression on {samples} samples."
