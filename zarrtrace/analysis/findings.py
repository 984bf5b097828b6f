"""The sentence that answers each analysis' question, from its result."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import dask
import numpy as np
import xarray as xr

_Result = TypeVar("_Result", xr.DataArray, xr.Dataset)

# Places, features or roles that a sentence names.
_NAMED = 4


def with_findings(result: _Result) -> _Result:
    """Return a result with the attribute ``findings``, which answers its question.

    Results that are still to be computed stay as they are, and so do those whose analysis wrote a
    sentence of its own.

    Parameters
    ----------
    result
        Result of an analysis.
    """
    sentence_of = _SENTENCES.get(str(result.attrs.get("analysis")))
    if sentence_of is None or "findings" in result.attrs or dask.is_dask_collection(result):
        return result
    return result.assign_attrs(findings=sentence_of(result))


def _attention_to(result: xr.DataArray) -> str:
    by_source = _by(_mean(result), "source")[:_NAMED]
    over, own = _over([(result, peak) for _, peak in by_source])
    per_token = '"reduce": "mean"' in str(result.attrs.get("parameters"))
    unit = " a token" if per_token else ""
    parts = [
        f"to {source or _one(result, 'source')} in {_at(values)} ({_number(values)}{unit}{few})"
        for (source, values), few in zip(by_source, own, strict=True)
    ]
    if not parts:
        return "No attention is stored at these places."
    target = (
        "the targets attend" if "target" in result.dims else _one(result, "target") + " attends"
    )
    return _sentence(f"{target} most {_joined(parts)}{over}")


def _through_layers(result: xr.DataArray) -> str:
    last = result.isel(layer=-1)
    by_source = _by(_mean(last), "source")[:_NAMED]
    over, own = _over([(last, peak) for _, peak in by_source])
    parts = [
        f"{source or _one(result, 'source')} {_number(values)}{few and f' ({few[2:]})'}"
        for (source, values), few in zip(by_source, own, strict=True)
    ]
    layers = result["layer"].values
    name = str(result.attrs["analysis"]).removeprefix("attention_")
    return (
        f"Attention {name} through layers {layers[0]} to {layers[-1]}"
        f"{over}: {_joined(parts) or 'nothing is known'}."
    )


def _feature_trajectory(result: xr.DataArray) -> str:
    mean = _mean(result)
    pairs = mean if "pair" in mean.dims else mean.expand_dims("pair")
    strongest = pairs if pairs.ndim == 1 else abs(pairs).max([d for d in pairs.dims if d != "pair"])
    order = np.argsort(-np.nan_to_num(abs(np.asarray(strongest))), kind="stable")
    named = [
        (result.isel(pair=number) if "pair" in result.dims else result, pairs.isel(pair=number))
        for number in order[:_NAMED].tolist()
    ]
    over, own = _over(named)
    parts = [
        f"feature {_pair(mean)} {_activation(one, mean, few.removeprefix(', '))}"
        for (one, mean), few in zip(named, own, strict=True)
    ]
    return _sentence(f"activation{over}: {_joined(parts)}")


def _activation(values: xr.DataArray, mean: xr.DataArray, few: str) -> str:
    """Say how strong a feature is, and in how many of the scenarios that have a value."""
    known = values.notnull()
    if not bool(known.any()):
        # Other reasons stand in the result: layers not stored, or NaN that the model computed.
        is_told = "missing" in values.attrs or "nonfinite" in values.attrs
        no_sae = f", because layer {int(values['layer'])} has no SAE"
        return "not known" + ("" if is_told else no_sae)
    fires = known & (values != 0)
    details = [few]
    strength = "silent"
    if bool(fires.any()):
        strength = _number(mean) + _where(mean)
        if "scenario" in values.dims:
            others = [dim for dim in values.dims if dim != "scenario"]
            counts = (int(of.any(others).sum()) for of in (fires, known))
            details.append("active in {} of {} scenarios".format(*counts))
    said = "; ".join(filter(None, details))
    return strength + (f" ({said})" if said else "")


def _pathway_features(result: xr.Dataset) -> str:
    score = abs(result["score"])
    if not bool(score.notnull().any()):
        return "No feature is active at both places."
    cell = score.isel(score.argmax(...))
    best = result.sel({dim: cell[dim] for dim in score.dims})
    same = (result["feature"] == best["feature"]).sel(layer=int(best["layer"])).any("rank")
    repeats = (
        f"; it is among the strongest of its layer in {int(same.sum())} of {same.size} scenarios"
        if "scenario" in same.dims
        else ""
    )
    scenario = str(np.asarray(best["scenario"]).item())
    return (
        f"Strongest on the pathway: feature {_pair(best)}, score {_number(best['score'])} in "
        f"{scenario}{repeats}."
    )


def _head_roles(result: xr.DataArray) -> str:
    mean = _mean(result)
    roles = ("induction", "duplicate_token", "previous_token", "first_token")
    over, own = _over([(result, mean.sel(role=role)) for role in roles])
    parts = []
    for role, few in zip(roles, own, strict=True):
        values = mean.sel(role=role)
        name = role.replace("_token", "-token")
        parts.append(
            f"{name} {_at(values)} ({_number(values)}{few})"
            if bool(values.notnull().any())
            else f"{name} not known, because no token repeats"
        )
    return f"Strongest heads, with the share of attention that fits{over}: " + (
        _joined(parts) + "."
    )


def _decision(result: xr.Dataset) -> str:
    probability = result["probability"]
    if "scenario" not in probability.dims:
        probability = probability.expand_dims("scenario")
    known = probability.transpose("scenario", "option").to_numpy()
    names = [str(name) for name in np.asarray(result["option"])]
    decided = ~np.isnan(known).all(1)
    best = np.nanargmax(known[decided], axis=1)
    counts = [f"{name} in {int((best == at).sum())}" for at, name in enumerate(names)]
    unknown = int((~decided).sum())
    lacking = f"; {unknown} without a stored option" if unknown else ""
    entropy = np.atleast_1d(result["entropy"].to_numpy())
    least = (
        f" Least decided: {np.atleast_1d(result['scenario'].values)[np.nanargmax(entropy)]} "
        f"(entropy {np.nanmax(entropy):.3g} nats)."
        if len(known) > 1 and np.isfinite(entropy).any()
        else ""
    )
    return f"The likeliest option of {_scenarios(len(known))}: {', '.join(counts)}{lacking}.{least}"


def _position_specific(result: xr.Dataset) -> str:
    parts = []
    for span in np.asarray(result["span"]).tolist()[:_NAMED]:
        score = result["score"].sel(span=span)
        if not bool(score.notnull().any()):
            parts.append(f"none for {span}")
            continue
        cell = score.isel(score.argmax(...))
        best = result.sel(span=span, layer=cell["layer"], rank=cell["rank"])
        parts.append(
            f"for {span} feature {_pair(best)} (fires at {float(best['rate_at']):.0%} of its "
            f"tokens, at {float(best['rate_elsewhere']):.1%} of others, in "
            f"{_scenarios(int(best['scenarios']))})"
        )
    return f"Most specific: {_joined(parts)}."


def _relate(result: xr.Dataset) -> str:
    p = result["p_permutation"]
    if not bool(p.notnull().any()):
        return "No quantity is known, and varies, in three scenarios."
    q = result["q_permutation"]
    found, tested = int((q <= 0.05).sum()), int(p.notnull().sum())
    # The strongest correlation among equal p.
    order = p.fillna(np.inf) - 1e-9 * abs(result["rho"]).fillna(0)
    best = result.isel(order.argmin(...)) if order.ndim else result
    where = _where(best["rho"].expand_dims("_"), named=True)
    return (
        f"{found} of {tested} correlations have q <= 0.05. Strongest{where}: rho = "
        f"{float(best['rho']):.3g}, p = {float(best['p_permutation']):.3g}, q = "
        f"{float(best['q_permutation']):.3g}, {int(best['n_scenarios'])} scenarios."
    )


_SENTENCES: dict[str, Callable[[Any], str]] = {
    "attention_to": _attention_to,
    "attention_rollout": _through_layers,
    "attention_flow": _through_layers,
    "feature_trajectory": _feature_trajectory,
    "pathway_features": _pathway_features,
    "head_roles": _head_roles,
    "decision": _decision,
    "position_specific_features": _position_specific,
    "relate": _relate,
}


# --- parts of sentences ------------------------------------------------------------------------


def _mean(result: xr.DataArray) -> xr.DataArray:
    """Return the mean over the scenarios in which a value is known."""
    return result.mean("scenario", skipna=True) if "scenario" in result.dims else result


def _over(peaks: list[tuple[xr.DataArray, xr.DataArray]]) -> tuple[str, list[str]]:
    """Say over how many scenarios means are: at once if equally many, else of each.

    Parameters
    ----------
    peaks
        A result and its mean; a sentence names the cell where that is largest.
    """
    own = [_over_scenarios(result, mean) for result, mean in peaks]
    if len({*filter(None, own)}) == 1:
        return max(own), [""] * len(own)
    return "", own


def _over_scenarios(result: xr.DataArray, mean: xr.DataArray) -> str:
    total = result.sizes.get("scenario", 1)
    if total == 1 or not bool(mean.notnull().any()):
        return ""
    peak = _peak(mean)
    cell = {dim: peak[dim].item() for dim in result.dims if dim in peak.coords}
    known = int(result.sel(cell).notnull().sum("scenario").max())
    if known == 1:
        return f", in 1 of {total} scenarios"
    return f", mean over {known}" + ("" if known == total else f" of {total}") + " scenarios"


def _by(values: xr.DataArray, dim: str) -> list[tuple[str, xr.DataArray]]:
    """Return the largest value of each label of a dimension, the largest first; known ones only."""
    labels = (
        [(str(one), values.sel({dim: one})) for one in np.asarray(values[dim])]
        if (dim in values.dims)
        else [("", values)]
    )
    largest = [(name, _peak(of)) for name, of in labels if bool(of.notnull().any())]
    return sorted(largest, key=lambda pair: -abs(float(pair[1])))


def _peak(values: xr.DataArray) -> xr.DataArray:
    """Return the value of largest magnitude, with its labels."""
    return values.isel(abs(values).argmax(...)) if values.ndim else values


def _scenarios(count: int) -> str:
    return "1 scenario" if count == 1 else f"{count} scenarios"


def _at(values: xr.DataArray) -> str:
    """Say which layer, and head, a peak is in."""
    peak = _peak(values)
    return " ".join(f"{dim} {int(peak[dim])}" for dim in ("layer", "head") if dim in peak.coords)


def _where(values: xr.DataArray, *, named: bool = False) -> str:
    """Say which place, or which labels, a peak is at."""
    peak = _peak(values)
    if not named:
        kind: list[Hashable] = ["place", "query"]
        return "".join(f" at {peak[dim].item()}" for dim in kind if dim in values.dims)
    shown = [
        f"{dim} {peak[dim].item()}"
        for dim in ("layer", "feature", "head", "source", "target", "place")
        if dim in peak.coords
    ]
    return f" ({', '.join(shown)})" if shown else ""


def _one(result: xr.DataArray, dim: str) -> str:
    return str(result[dim].item()) if dim in result.coords else dim


def _pair(values: Any) -> str:
    return f"{int(values['layer'])}:{int(values['feature'])}"


def _number(values: xr.DataArray) -> str:
    return f"{float(_peak(values)):.3g}"


def _joined(parts: list[str]) -> str:
    return ", ".join(parts)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
