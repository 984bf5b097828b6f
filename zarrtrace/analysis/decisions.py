"""Probabilities of options, and their correlates over scenarios."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.gaps import GAPS
from zarrtrace.analysis.positions import Place
from zarrtrace.analysis.repeats import SCENARIO_NAME, correlations_within, varies_within
from zarrtrace.analysis.resampling import (
    DEFAULT_PERMUTATIONS,
    corrected,
    correlations,
    same_rows,
)
from zarrtrace.analysis.results import described
from zarrtrace.analysis.samples import samples
from zarrtrace.analysis.tables import SAMPLE, Before
from zarrtrace.analysis.trace_arrays import whole
from zarrtrace.analysis.traces import Data, is_run, options, scenario_names
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

_ALPHA = 0.05


def decision(data: Data, *, at: str = DECISION, vocabulary: int | None = None) -> xr.Dataset:
    """Next-token distribution at the decision: the probability of each option, and entropy.

    Parameters
    ----------
    data
        A trace, a run or a table with ``next_token``.
    at
        ``"decision"``, the last token of the prompt; or a span, such as ``"answer"`` of a generated
        text: the token before its first one, where the model decides how it begins.
    vocabulary
        Size of the model's vocabulary, for the upper bound of the entropy.

    Returns
    -------
    xr.Dataset
        By ``scenario`` (a scalar coordinate for a trace), lazy if `data` is:

        ``probability (option)``
            Probability of the option's first token; NaN if it is not among the ten that are stored.
        ``upper_bound (option)``
            `probability`, or the most it can be if not stored: the tenth probability, or what the
            ten leave if that is less.
        ``share (option)``
            `probability` divided by that of all options together; NaN if one is not stored.
        ``entropy``
            In nats, of the ten stored and everything else taken as one outcome. That is a lower
            bound of the distribution's entropy.
        ``entropy_upper``
            Its upper bound, everything else spread evenly; only if `vocabulary` is given.
        ``remainder``
            Probability that the ten stored ones leave.
        ``top_token``, ``top_token_text``, ``top_probability``
            The most likely continuation: id, text and probability.

        Options that a scenario does not have are NaN, and so is all of a scenario without the span
        `at` (``top_token`` −1); ``attrs["limits"]`` counts these.

    Raises
    ------
    ConfigError
        If a trace has no next-token probabilities, no scenario has options, or the position is not
        stored.
    ScenarioError
        If no scenario has the span `at`.

    Notes
    -----
    A description of each scenario: no null hypothesis is tested. :func:`relate` and
    :func:`contrast` test what goes with it.
    """
    ids = options(data)
    if not ids:
        raise ConfigError(
            "no scenario has options",
            why="Options are the continuations whose probability matters: {bet: '1', stop: '2'}.",
            remedy="Name them under 'options' in the scenarios file and extract again.",
        )

    place: Place = at if at == DECISION else Before(at)
    found = samples(data, [place], ["next_token", "next_token_logprob"], ["next_token_text"])
    stored = found.arrays.reset_coords(drop=True).rename({SAMPLE: "scenario"})
    names = np.array(scenario_names(data), object)
    stored = stored.assign_coords(scenario=names[found.of_scenario])
    wanted = xr.DataArray(
        np.stack([of[found.of_scenario] for of in ids.values()], axis=-1),
        {"scenario": stored["scenario"], "option": list(ids)},
        ("scenario", "option"),
    )
    if not is_run(data):
        stored, wanted = stored.isel(scenario=0), wanted.isel(scenario=0)
    # One block over all scenarios: a hundred numbers each, and dozens of steps.
    stored = stored.map(lambda array: whole(array, *array.dims))
    out = _distribution(stored, wanted, vocabulary)
    absent = len(names) - len(found.of_scenario)
    if absent and is_run(data):
        fill = {"top_token": -1, "top_token_text": ""}
        out = out.reindex(
            scenario=pd.Index(names), fill_value={n: fill.get(str(n), np.nan) for n in out}
        )
    if at != DECISION:
        out.attrs["limits"] = (
            f"{absent} of {len(names)} traces have no span {at!r}: NaN. An option is its first "
            "token as it follows the prompt; within a text it may be written by another token."
        )
    return described(
        out,
        data,
        "decision",
        "stored next-token probabilities at "
        + ("the prompt's last token" if at == DECISION else f"the token before span {at!r}")
        + "; entropy in nats, a lower bound: all that is not stored counts as one outcome",
        options=list(ids),
        at=at,
        vocabulary=vocabulary,
    )


def _distribution(here: xr.Dataset, wanted: xr.DataArray, vocabulary: int | None) -> xr.Dataset:
    ids = here["next_token"].astype(np.int64)
    probability = xr.apply_ufunc(
        np.exp, here["next_token_logprob"].astype(np.float64), dask="allowed"
    )
    remainder = (1 - probability.sum("rank", skipna=False)).clip(0, 1)
    chosen = probability.where(ids == wanted).max("rank").transpose(*wanted.dims)
    # Stored ones are the most likely: no other can exceed the last of them, nor what they leave.
    tenth = probability.isel(rank=-1, drop=True)
    bound = tenth.where(tenth < remainder, remainder)
    of_options = chosen.where(wanted >= 0, 0).sum("option", skipna=False)
    entropy = _surprise(probability).sum("rank", skipna=False) + _surprise(remainder)
    out = xr.Dataset(
        {
            "probability": chosen,
            "upper_bound": chosen.fillna(bound).where(wanted >= 0),
            "share": chosen / of_options,
            "entropy": entropy.assign_attrs(units="nat"),
            "remainder": remainder,
            "top_token": ids.isel(rank=0, drop=True),
            **{
                name: here["next_token_text"].isel(rank=0, drop=True)
                for name in ("top_token_text",)
                if "next_token_text" in here
            },
            "top_probability": probability.isel(rank=0, drop=True),
        }
    )
    if vocabulary is not None:
        rest = vocabulary - ids.sizes["rank"]
        if rest < 1:
            raise ConfigError(
                f"vocabulary={vocabulary} is not the size of a vocabulary",
                why=f"{ids.sizes['rank']} continuations are stored.",
                remedy="Give the model's vocab_size.",
            )
        out["entropy_upper"] = entropy + remainder * math.log(rest)
    return out


def _surprise(probability: xr.DataArray) -> xr.DataArray:
    """−p log p, 0 at 0."""
    positive = probability.where(probability != 0, 1)
    logarithm: xr.DataArray = xr.apply_ufunc(np.log, positive, dask="allowed")
    return -probability * logarithm


def relate(
    outcome: xr.DataArray,
    quantity: xr.DataArray,
    *,
    n_permutations: int = DEFAULT_PERMUTATIONS,
    seed: int = 0,
) -> xr.Dataset:
    """How a quantity goes with an outcome over scenarios: rank correlation, everywhere at once.

    Parameters
    ----------
    outcome
        ``(scenario)``, for example ``decision(run).probability.sel(option="bet")``.
    quantity
        ``(scenario, …)``, for example ``attention_to(run, "balance")`` or a feature trajectory.
    n_permutations, seed
        Permutations to draw where there are more than 10,000 orders (more than 7 scenarios).

    Returns
    -------
    xr.Dataset
        ``rho`` (Spearman 1904), ``p_permutation`` (two-sided), ``q_permutation`` (Benjamini &
        Hochberg 1995, over all of the result) and ``n_scenarios``, with the other dimensions of
        `quantity`. Only scenarios in which both are known count; NaN with fewer than three, or
        where one does not vary. ``attrs["smallest_p"]`` is the least p that any of them can reach,
        ties counted; ``findings`` and ``limits`` are sentences, and ``unit`` says what was
        exchanged. Computed at the call.

    Raises
    ------
    ConfigError
        If one of them has no dimension ``scenario``, or they share fewer than three.

    Notes
    -----
    The null is that scenarios are exchangeable: any order of the outcome is as likely. Scenarios
    that are variants of few templates are not. Nor are repeats of one prompt, which results tell by
    their coordinate ``scenario_name``: an outcome that differs among the repeats of a scenario, as
    :func:`chose`, is ranked and permuted among the repeats of each; of any other outcome, and its
    quantity, the mean over repeats counts once a scenario. Seven scenarios without
    ties can reach p = 2/5040; an outcome that is 1 in one of eight scenarios and 0 in the others
    cannot go below 1/8.
    """
    for name, array in (("outcome", outcome), ("quantity", quantity)):
        if "scenario" not in array.dims:
            raise ConfigError(
                f"the {name} has no dimension 'scenario'",
                why=f"It has: {', '.join(map(str, array.dims)) or 'none'}.",
                remedy="Compute it from a whole run, and choose one option.",
            )
    if outcome.ndim != 1:
        raise ConfigError(
            f"the outcome has dimensions {', '.join(map(str, outcome.dims))}",
            remedy="Choose one value a scenario, for example .sel(option='bet').",
        )
    outcome = outcome.dropna("scenario")
    outcome, quantity = xr.align(
        outcome, quantity, join="inner", exclude=set(quantity.dims[1:]) - {"scenario"}
    )
    outcome, quantity, blocks = _with_repeats(outcome, quantity)
    if outcome.size < 3:
        raise ConfigError(
            f"only {outcome.size} scenarios have both",
            why="A rank correlation needs at least three.",
            remedy="Extract more scenarios, or choose another option.",
        )
    quantity = quantity.transpose("scenario", ...)
    dims, shape = quantity.dims[1:], quantity.shape[1:]
    values = np.asarray(quantity, dtype=np.float64).reshape(outcome.size, -1)
    known = np.asarray(outcome, dtype=np.float64)
    rho, p = np.full((2, values.shape[1]), np.nan)
    number = np.zeros(values.shape[1], np.int64)
    smallest = np.full(values.shape[1], np.nan)
    for rows, columns in same_rows(np.isfinite(values)):
        number[columns] = rows.sum()
        if rows.sum() < 3:
            continue
        test: Callable[..., tuple[np.ndarray, np.ndarray, Any]] = correlations
        if blocks is not None:
            test = partial(correlations_within, blocks=blocks[rows])
        rho[columns], p[columns], smallest[columns] = test(
            known[rows],
            values[np.ix_(rows, columns)],
            n_permutations=n_permutations,
            seed=seed,
        )
    observed = f"{outcome.size} scenarios"
    if blocks is not None:
        observed = f"{outcome.size} repeats of {blocks.max() + 1} scenarios, exchanged within these"
    out = xr.Dataset(
        {
            "rho": (dims, rho.reshape(shape)),
            "p_permutation": (dims, p.reshape(shape)),
            "q_permutation": (dims, corrected(p).reshape(shape)),
            "n_scenarios": (dims, number.reshape(shape)),
        },
        coords={
            name: coord for name, coord in quantity.coords.items() if "scenario" not in coord.dims
        },
    )
    gaps = {name: quantity.attrs[name] for name in GAPS if name in quantity.attrs}
    return out.assign_attrs(
        analysis="relate",
        method="Spearman's rank correlation over scenarios (1904), two-sided permutation p-value "
        "(Phipson & Smyth 2010), q by Benjamini & Hochberg (1995)",
        n_scenarios=int(outcome.size),
        n_tests=int(np.isfinite(p).sum()),
        unit="scenario" if blocks is None else "repeat, within its scenario",
        **_related(rho, p, smallest, observed),
        **gaps,
    )


def _related(
    rho: np.ndarray, p: np.ndarray, smallest: np.ndarray, observed: str
) -> dict[str, str | float]:
    """Return the attributes that say what was found, and what could have been."""
    tests = int(np.isfinite(p).sum())
    if not tests:
        said = "Nothing was tested: the outcome, or the quantity, does not vary."
        return {"smallest_p": 1.0, "findings": said, "limits": said}
    least = float(np.nanmin(smallest))
    q = corrected(p)
    found = int((q <= _ALPHA).sum())
    findings = f"{found} of {tests} go with the outcome, q_permutation <= {_ALPHA}"
    if found:
        strongest = float(rho[np.nanargmax(np.where(q <= _ALPHA, np.abs(rho), np.nan))])
        findings += f"; the strongest has rho = {strongest:.2f}"
    limits = (
        f"{observed}: no p_permutation below {least:.4g}. Of {tests} tests, one alone "
        f"at that p has q_permutation = {min(1.0, least * tests):.3g}. A correlation over "
        "scenarios is no cause, and scenarios of one template are not independent."
    )
    return {"smallest_p": least, "findings": f"{findings}.", "limits": limits}


def _with_repeats(
    outcome: xr.DataArray, quantity: xr.DataArray
) -> tuple[xr.DataArray, xr.DataArray, np.ndarray | None]:
    """Return both by what is exchangeable, and blocks within which rows are, if these are repeats.

    If the repeats of a scenario share an outcome, it and its quantity are averaged over them.
    """
    named = next(
        (one[SCENARIO_NAME] for one in (outcome, quantity) if SCENARIO_NAME in one.coords), None
    )
    if named is None:
        return outcome, quantity, None
    names = named.sel(scenario=outcome["scenario"].to_numpy()).to_numpy()
    if varies_within(outcome.to_numpy(), names):
        return outcome, quantity, pd.factorize(names)[0]
    both = [
        one.reset_coords(drop=True).assign_coords(scenario=names).groupby("scenario").mean()
        for one in (outcome, quantity)
    ]
    return both[0], both[1], None
