"""Options that sampled continuations chose, counted over repeats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from zarrtrace.analysis.decisions import decision
from zarrtrace.analysis.repeats import CHOICE
from zarrtrace.analysis.results import described
from zarrtrace.analysis.tables import is_table
from zarrtrace.analysis.traces import (
    Data,
    independent,
    options,
    over_repeats,
    repeats,
    scenario_names,
    traces,
)
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION
from zarrtrace.suggestions import did_you_mean


def choices(data: Data, *, at: str = DECISION, confidence: float = 0.95) -> xr.Dataset:
    """Count the options that generated texts chose, next to their stored probabilities.

    Parameters
    ----------
    data
        A run, a trace or a table with generated text.
    at
        Where the stored probability is taken: ``"decision"``, the last token of the prompt, or
        ``"answer"``, the token before the answer, as :func:`decision` takes them.
    confidence
        Level of the intervals.

    Returns
    -------
    xr.Dataset
        Loaded, by ``scenario``, its repeats taken together:

        ``count (scenario, option)``
            Repeats that chose the option.
        ``rate``, ``low``, ``high (scenario, option)``
            `count` by all repeats, those without a choice included, and its interval; NaN where
            the scenario has not the option.
        ``probability (scenario, option)``
            Stored probability of the option's first token, the mean over repeats; NaN if it is not
            among the ten that are stored. Absent if no next tokens are.
        ``repeats``, ``none (scenario)``
            Repeats, and those in which no option was found.

        ``attrs["findings"]`` counts choices over all scenarios.

    Raises
    ------
    ConfigError
        If no text was generated, or no scenario has options.
    ScenarioError
        If no text has an answer, for ``at="answer"``.

    Notes
    -----
    The interval is Clopper & Pearson's (1934): exact for independent repeats of one prompt, it
    covers the rate with at least `confidence` at any number of them. If all n repeats choose
    the same, it still reaches down to about 1 − 3.7/n. Repeats are drawn with the run's
    temperature and top-p: only at temperature 1 and top-p 1 does the stored probability say what
    rate to expect, and only where the option follows the prompt at once. No null hypothesis is
    tested; the repeat is the unit.
    """
    chosen, known = _chosen(data), options(data)
    _check(chosen, known, confidence)
    names = dict.fromkeys([*known, *(one for one in chosen if one)])
    of_scenario, scenarios = pd.factorize(independent(data))
    number = np.bincount(of_scenario)
    has = np.ones((len(scenarios), len(names)), bool)
    count = np.zeros((len(scenarios), len(names)), np.int64)
    for column, name in enumerate(names):
        count[:, column] = np.bincount(of_scenario, chosen == name)
        if name in known:
            has[:, column] = np.bincount(of_scenario, known[name] >= 0) > 0
    low, high = binomial_interval(count, number[:, None], confidence)
    dims = ("scenario", "option")
    out = xr.Dataset(
        {
            "count": (dims, count),
            "rate": (dims, np.where(has, count / number[:, None], np.nan)),
            "low": (dims, np.where(has, low, np.nan)),
            "high": (dims, np.where(has, high, np.nan)),
            "repeats": ("scenario", number),
            "none": ("scenario", np.bincount(of_scenario, chosen == "").astype(np.int64)),
        },
        coords={"scenario": np.asarray(scenarios, object), "option": list(names)},
    )
    stored = _probability(data, at)
    if stored is not None:
        out["probability"] = stored.reindex_like(out["rate"])
    out = described(
        out,
        data,
        "choices",
        "options found in continuations, counted over repeats; interval of Clopper & Pearson "
        "(1934); probability of the option's first token as stored",
        at=at,
        confidence=confidence,
    )
    return out.assign_attrs(findings=_findings(out), limits=_limits(out, data, confidence))


def chose(data: Data, option: str) -> xr.DataArray:
    """Tell which generated texts chose an option: an outcome for :func:`relate`.

    Parameters
    ----------
    data
        A run or a table with generated text.
    option
        Name of the option.

    Returns
    -------
    xr.DataArray
        ``(scenario)``, a value a repeat: 1 if it chose the option, 0 if another, NaN if none.

    Raises
    ------
    ConfigError
        If no text was generated, or none chose the option.
    """
    chosen = _chosen(data)
    if option not in chosen:
        raise ConfigError(
            f"no generated text chose {option!r}",
            why="Options are named in the scenarios file, and looked for in each continuation.",
            remedy=did_you_mean(option, sorted({*chosen} - {""}), label="Chosen were"),
        )
    values = np.where(chosen == "", np.nan, chosen == option)
    names = np.array(scenario_names(data), object)
    out = xr.DataArray(values, {"scenario": names}, "scenario", name="chose")
    return described(out, data, "chose", "1 where the option was chosen", option=option)


def binomial_interval(
    count: np.ndarray, number: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of Clopper & Pearson's interval of a rate."""
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):
        low = stats.beta.ppf(tail, count, number - count + 1)
        high = stats.beta.ppf(1 - tail, count + 1, number - count)
    return np.where(count == 0, 0.0, low), np.where(count == number, 1.0, high)


def _chosen(data: Data) -> np.ndarray:
    """Return the option that each generated text chose, empty for none."""
    columns = repeats(data)
    if CHOICE not in columns:
        raise ConfigError(
            "no text was generated",
            why="Choices are options that a continuation of the prompt holds.",
            remedy="Extract with --generate N, or look at 'decision': the probability of each.",
        )
    return columns[CHOICE]


def _check(chosen: np.ndarray, known: Mapping[str, np.ndarray], confidence: float) -> None:
    if not known and not chosen.astype(bool).any():
        raise ConfigError(
            "no scenario has options",
            why="Options are looked for in the continuation: {bet: '1', stop: '2'}.",
            remedy="Name them under 'options' in the scenarios file and extract again.",
        )
    if not 0 < confidence < 1:
        raise ConfigError(
            f"confidence={confidence} is no probability", remedy="Give one, such as 0.95."
        )


def _probability(data: Data, at: str) -> xr.DataArray | None:
    """Return the mean stored probability ``(scenario, option)``; None if there is none."""
    held = [data] if is_table(data) else traces(data).values()
    if not options(data) or not all("next_token" in ds for ds in held):
        return None
    found = decision(data, at=at)["probability"].compute()
    if "scenario" not in found.dims:
        found = found.expand_dims("scenario")
    return over_repeats(found.reset_coords(drop=True), data)


def _findings(out: xr.Dataset) -> str:
    number, none = int(out["repeats"].sum()), int(out["none"].sum())
    counted = ", ".join(
        f"{name} {int(out['count'].sel(option=name).sum())}" for name in out["option"].to_numpy()
    )
    scenarios = out.sizes["scenario"]
    found = f"{number} continuations of {scenarios} scenarios chose: {counted}; no option {none}."
    if "probability" in out:
        known = np.isfinite(out["probability"]) & np.isfinite(out["rate"])
        inside = (out["probability"] >= out["low"]) & (out["probability"] <= out["high"])
        found += (
            f" The stored probability lies within the interval in {int((inside & known).sum())} of "
            f"{int(known.sum())} cases."
        )
    return found


def _limits(out: xr.Dataset, data: Data, confidence: float) -> str:
    fewest = int(out["repeats"].min())
    low, high = binomial_interval(np.array(fewest // 2), np.array(fewest), confidence)
    found = (
        f"With {fewest} repeats a rate of one half is known from {float(low):.2f} to "
        f"{float(high):.2f}; intervals are of each scenario and option by itself."
    )
    settings = _settings(data)
    if settings not in ({(1.0, 1.0)}, set()):
        said = ", ".join(f"temperature {t:g} and top-p {p:g}" for t, p in sorted(settings))
        found += (
            f" The texts were drawn at {said}: the stored probability, at temperature 1 and top-p "
            "1, is not the rate to expect."
        )
    return found


def _settings(data: Data) -> set[tuple[float, float]]:
    """Return temperature and top-p of all texts, as far as they are known."""
    if is_table(data):
        found = [data.attrs.get("config", {}).get("generation")]
    else:
        found = [ds.attrs.get("generation") for ds in traces(data).values()]
    return {(float(one["temperature"]), float(one["top_p"])) for one in found if one}
