"""Which layers attend to a span more than to other tokens of the same prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import xarray as xr

from zarrtrace.analysis.placebos import AttendedPrompt, NeighbourContrast, compare, variants
from zarrtrace.analysis.positions import (
    Place,
    has_span,
    positions,
    present,
    require_places,
    require_queries,
    span_names,
    spans_before,
    token_labels,
)
from zarrtrace.analysis.resampling import corrected
from zarrtrace.analysis.results import described, per_scenario
from zarrtrace.analysis.trace_arrays import attention, taken, token_ids
from zarrtrace.analysis.traces import Data, independent, traces
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

#: With fewer different placebos, those of all layers are one distribution.
LEAST_DRAWS = 2000
# A standard deviation without one of the values needs two others.
_FEWEST = 4
# Statistics of the same numbers in another order differ by rounding, and must count as equal.
_TIE = 1e-9
# Logarithms of ratios are cut here: in a sliding window, attention is 0 and the ratio infinite.
_MOST = 10.0


def critical_layers(
    data: Data,
    spans: Sequence[str] | None = None,
    target: Place = DECISION,
    *,
    controls: int = 4,
    alpha: float = 0.05,
    draws: int = 9999,
    seed: int = 0,
) -> xr.Dataset:
    """Find the layers whose attention to a span stands out among other groups of tokens.

    Parameters
    ----------
    data
        A run, or a trace.
    spans
        Spans to test; None takes all but the decision.
    target
        Whose attention it is; the mean over its tokens.
    controls
        Neighbours that each token is compared with: the nearest tokens, before and behind, that
        are in no span, neither the first token nor special, and before the target.
    alpha
        False discovery rate at which a layer is called critical.
    draws
        Placebos to draw, at least 2,000, if there are more.
    seed
        Seed of the draws.

    Returns
    -------
    xr.Dataset
        Loaded, ``(source, layer)`` by span: ``attention`` and ``control`` (of the span's tokens
        and of their neighbours, for one token, means over scenarios), ``difference``, ``ratio``
        (of the two), ``z`` (log ratio less the placebos' mean, by its standard error),
        ``p`` (two-sided), ``q`` (Benjamini-Hochberg over all layers and spans), ``n`` scenarios,
        and ``critical``: q ≤ `alpha`, and the ratio is above the placebos' mean. By span:
        ``placebos (source)``, how many were compared, and ``smallest_p (source)``.

        Attributes: ``findings`` and ``limits`` in words, ``prompts``, how many prompts there are
        that are not variants of another, and ``smallest_p`` of all spans.

    Raises
    ------
    ConfigError
        If there is no attention, or no span has enough placebos.
    ScenarioError
        If no scenario has a span.

    Notes
    -----
    Null hypothesis: the span is one of the groups of tokens of its prompt. The statistic is the
    log of the ratio of attention to a group and to its neighbours, which lie as far from the
    target; both are averaged over scenarios first. A placebo is a group of the span's size and
    shape whose tokens are in no span, compared with its own neighbours.

    The unit of exchange is a group of tokens of a prompt, and scenarios that are variants of one
    prompt (they share half of their pairs of neighbouring tokens) are one unit: they have the
    same words at the same places, and a word that gets more attention than its neighbours gets
    it in all of them. So a placebo is the same tokens of the template in all its variants, and
    independent between prompts that are no variants. Drawn independently in each variant,
    placebos would average out, and nearly every word would stand out.

    Where prompts together have fewer than 2,000 different placebos (a template has about a
    hundred), the placebos of all layers are one distribution, each studentised by the other
    groups of its layer: this assumes that the shape of the distribution, not its centre or its
    spread, is common to the layers. p is the share of groups at least as extreme, the span itself
    counted (Phipson & Smyth 2010). Its floor is 1/(placebos + 1), or 1/((placebos + 1) × layers):
    with one template and k spans, q ≤ 0.05 in one layer alone takes 20 k placebos.
    """
    names = list(spans) if spans is not None else spans_before(data, [target])
    _check(names, controls, draws)
    require_places(data, [*names, target])
    rows = per_scenario(data, partial(_attention_row, target=target)).compute()
    prompts = _prompts(data, rows, names, target)
    groups = variants([prompt.own for prompt in prompts])
    rng = np.random.default_rng(seed)
    by_span = {
        name: _tested([[prompts[i] for i in group] for group in groups], name, controls, draws, rng)
        for name in names
    }
    _refuse_without_placebos(by_span)
    out = _collected(by_span, rows["layer"].values, alpha)
    out = out.assign_attrs(
        findings=_findings(out),
        limits=_limits(out, len({one.scenario for one in prompts}), len(groups), alpha),
        prompts=len(groups),
        smallest_p=float(out["smallest_p"].min()),
    )
    return described(
        out,
        data,
        "critical_layers",
        "log ratio of attention to a span's tokens and to the nearest tokens outside spans; p from "
        "placebo groups of tokens of the same prompts, Benjamini-Hochberg (1995)",
        spans=names,
        target=target,
        controls=controls,
        alpha=alpha,
        draws=draws,
        seed=seed,
    )


def _check(names: Sequence[str], controls: int, draws: int) -> None:
    if controls < 1 or not names:
        raise ConfigError(
            f"nothing to compare: {len(names)} spans, {controls} controls",
            remedy="Give at least one of each.",
        )
    if draws < LEAST_DRAWS:
        raise ConfigError(
            f"{draws} draws are too few",
            why="q is corrected for all layers and spans, so p must be able to be very small.",
            remedy=f"Give at least {LEAST_DRAWS}.",
        )


# --- prompts -----------------------------------------------------------------------------------


def _attention_row(ds: xr.Dataset, target: Place) -> xr.DataArray | None:
    """Return the attention that a target pays, ``(layer, key)`` float64."""
    array = attention(ds, "mean")
    if not present(ds, [target]):
        return None
    queries = positions(ds, target)
    require_queries(ds, queries)
    return taken(array, query=queries).mean("query", skipna=False, dtype=np.float64)


def _prompts(
    data: Data, rows: xr.DataArray, names: Sequence[str], target: Place
) -> list[AttendedPrompt]:
    """Return the prompts that have the target, with those of the spans that it can attend to."""
    found = []
    every = rows.transpose(..., "layer", "key").values
    by_scenario = every if every.ndim > 2 else every[None]
    for scenario, row, ds in zip(
        independent(data), by_scenario, traces(data).values(), strict=True
    ):
        if not present(ds, [target]):
            continue
        keys = token_labels(ds)
        last = max(positions(ds, target))
        own = {n: np.unique(positions(ds, n)) for n in names if has_span(ds, n)}
        ids = token_ids(ds, "Variants of a prompt are recognised by their tokens.")
        found.append(
            AttendedPrompt(
                scenario=str(scenario),
                ids=ids,
                own=ids[: (ds.attrs.get("generation") or {}).get("prompt_tokens")],
                attention=row[:, rows.indexes["key"].get_indexer(keys)],
                is_free=_free_tokens(ds, target),
                spans={n: np.searchsorted(keys, at) for n, at in own.items() if at[0] <= last},
            )
        )
    return found


def _free_tokens(ds: xr.Dataset, target: Place) -> np.ndarray:
    """Tell which tokens up to the target are in no span, not the first and not special."""
    tokens, targets = token_labels(ds), positions(ds, target)
    taken_up = {int(tokens[0]), *targets}
    for name in span_names(ds):
        taken_up.update(positions(ds, name))
    is_free = ~np.isin(tokens, list(taken_up)) & (tokens <= max(targets))
    if "special" in ds.coords and ds["special"].dims == ("key",):
        is_free &= ~ds["special"].values
    return np.asarray(is_free)


# --- test --------------------------------------------------------------------------------------


class _SpanTest(NamedTuple):
    """One span's columns ``(layer,)``, and how many placebos there were."""

    columns: dict[str, np.ndarray]
    placebos: int
    smallest_p: float


def _tested(
    groups: Sequence[Sequence[AttendedPrompt]],
    span: str,
    controls: int,
    draws: int,
    rng: np.random.Generator,
) -> _SpanTest | None:
    """Test one span, given the prompts by what they are variants of."""
    having = [[one for one in group if span in one.spans and one.is_free.any()] for group in groups]
    parts = [compare(group, span, controls) for group in having if group]
    parts = [part for part in parts if len(part.own) > 1]
    sizes = [len(part.own) for part in parts]
    if not parts or math.prod(sizes) <= _FEWEST:
        return None
    own, beside = _averaged(parts, _choices(sizes, draws, rng))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.clip(np.log2(own / beside), -_MOST, _MOST)
    z, p, smallest = _among_placebos(logs)
    columns = {
        "attention": own[0],
        "control": beside[0],
        "difference": own[0] - beside[0],
        "ratio": np.divide(own[0], beside[0], out=np.full_like(z, np.nan), where=beside[0] > 0),
        "z": z,
        "p": p,
        "n": np.sum([part.n for part in parts], axis=0),
    }
    return _SpanTest(columns, len(own) - 1, smallest)


def _choices(sizes: Sequence[int], draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return numbers of groups, one of each prompt ``(choice, prompt)``: all choices, or some.

    The span is number 0 of each prompt, and first. It is among what is drawn of each prompt, too:
    one of its words may be extreme in one prompt alone.
    """
    if math.prod(sizes) <= draws:
        return np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), axis=1)
    return np.vstack([np.zeros(len(sizes), np.int64), rng.integers(0, sizes, (draws, len(sizes)))])


def _averaged(
    parts: Sequence[NeighbourContrast], chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return means over scenarios ``(choice, layer)`` of the groups chosen in each prompt."""
    weights = np.array([part.n for part in parts], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        weights /= weights.sum(0)
    means = np.zeros((2, len(chosen), weights.shape[1]))
    for part, weight, numbers in zip(parts, weights, chosen.T, strict=True):
        for at, values in enumerate((part.own, part.beside)):
            # A prompt whose layer is missing weighs nothing there.
            means[at] += weight * np.where(weight > 0, values, 0)[numbers]
    means[:, :, ~np.isfinite(weights).all(0)] = np.nan
    return means[0], means[1]


def _among_placebos(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return z and p ``(layer,)`` of the first of many statistics ``(choice, layer)``.

    Also the smallest p that there can be.
    """
    count, layers = values.shape
    z, p = np.full(layers, np.nan), np.full(layers, np.nan)
    usable = np.isfinite(values).all(0) & (np.ptp(values, axis=0) > 0)
    scores = _studentised(values[:, usable])
    z[usable] = scores[0]
    if count > LEAST_DRAWS:
        p[usable] = (np.abs(scores) >= np.abs(scores[0]) - _TIE).mean(0)
        return z, p, 1 / count
    # A score without a value has no spread around it: it is as extreme as can be.
    every = np.sort(np.nan_to_num(np.abs(scores), nan=np.inf).ravel())
    below = np.searchsorted(every, np.abs(scores[0]) - _TIE)
    p[usable] = (every.size - below) / max(every.size, 1)
    return z, p, 1 / max(every.size, 1)


def _studentised(values: np.ndarray) -> np.ndarray:
    """Return each value of a column less the others' mean, by the error that this predicts."""
    others = len(values) - 1
    # Around the mean of all, where squares cancel least.
    centred = values - values.mean(0)
    variance = ((centred**2).sum(0) - centred**2 * (1 + 1 / others)) / (others - 1)
    error = np.sqrt(np.maximum(variance, 0) * (1 + 1 / others))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(centred * (1 + 1 / others) / error)


# --- results -----------------------------------------------------------------------------------


def _refuse_without_placebos(by_span: Mapping[str, _SpanTest | None]) -> None:
    if not any(by_span.values()):
        raise ConfigError(
            f"nothing to compare {', '.join(map(repr, by_span))} with",
            why=f"Fewer than {_FEWEST} groups of as many tokens are outside spans and before the "
            "target.",
            remedy="Test shorter spans, or prompts with more text beside them.",
        )


def _collected(
    by_span: Mapping[str, _SpanTest | None], layers: np.ndarray, alpha: float
) -> xr.Dataset:
    """Return the columns of all spans ``(source, layer)``, with q and what is critical."""
    tested = [one for one in by_span.values() if one]
    absent = dict.fromkeys(tested[0].columns, np.full(len(layers), np.nan))
    columns = [one.columns if one else absent for one in by_span.values()]
    out = xr.Dataset(
        {
            name: (("source", "layer"), np.array([column[name] for column in columns]))
            for name in absent
        },
        coords={"source": list(by_span), "layer": layers},
    )
    out["n"] = out["n"].fillna(0).astype(np.int64)
    out["q"] = (("source", "layer"), corrected(out["p"].values))
    out["critical"] = (out["q"] <= alpha) & (out["z"] > 0)
    out["placebos"] = ("source", [one.placebos if one else 0 for one in by_span.values()])
    out["smallest_p"] = ("source", [one.smallest_p if one else 1.0 for one in by_span.values()])
    return out


def _findings(out: xr.Dataset) -> str:
    """Say in which layers each span stands out, a sentence each."""
    lines = []
    for name in out["source"].values.tolist():
        one = out.sel(source=name)
        if not int(one["placebos"]):
            lines.append(f"{name} is not tested: no group of tokens to compare it with.")
            continue
        found = one.sel(layer=one["critical"].values)
        if not found.sizes["layer"]:
            lines.append(f"{name} stands out in no layer.")
            continue
        layers = ", ".join(
            f"{int(layer)} ({float(ratio):.1f}×)"
            for layer, ratio in zip(found["layer"], found["ratio"], strict=True)
        )
        lines.append(
            f"{name} stands out in layer{'s' * (found.sizes['layer'] > 1)} {layers}: attention to "
            "it over that to the tokens beside it."
        )
    return "\n".join(lines)


def _limits(out: xr.Dataset, scenarios: int, prompts: int, alpha: float) -> str:
    """Say how small p can be, and what was compared."""
    tested = out.sel(source=out["placebos"].values > 0)
    fewest, floor = int(tested["placebos"].min()), float(tested["smallest_p"].max())
    pooled = ", pooled over layers," if fewest < LEAST_DRAWS else ""
    # Benjamini-Hochberg: this many at the smallest p are needed.
    needed = math.ceil(floor * int(out["p"].notnull().sum()) / alpha)
    together = (
        f" {needed} layers must stand out together to have q <= {alpha:g}." if needed > 1 else ""
    )
    of_one = (
        f"The {scenarios} scenarios are variants of {prompts} prompt{'s' * (prompts > 1)}, and "
        f"count as {prompts}: "
        if prompts < scenarios
        else ""
    )
    text = (
        f"{of_one}{fewest} placebos or more a span{pooled} give p no smaller than "
        f"{floor:.2g}.{together} A small q says that a span is no common group of tokens of these "
        "prompts, not why."
    )
    return text[0].upper() + text[1:]
