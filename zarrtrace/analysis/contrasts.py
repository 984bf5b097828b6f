"""Differences between two groups of scenarios."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.activations import active_features, side_by_side
from zarrtrace.analysis.claims import claims
from zarrtrace.analysis.family import (
    STATISTICS,
    Family,
    columns_of,
    corrected_familywise,
    corrected_welch,
)
from zarrtrace.analysis.groups import Block, Group, Groups, exchange_of, groups_of
from zarrtrace.analysis.positions import (
    Place,
    as_places,
    has_span,
    label,
    positions,
    require_places,
    require_queries,
    span_names,
    spans_before,
)
from zarrtrace.analysis.resampling import (
    DEFAULT_PERMUTATIONS,
    TwoGroups,
    corrected,
    familywise,
    same_rows,
)
from zarrtrace.analysis.results import described
from zarrtrace.analysis.templates import number_of_templates
from zarrtrace.analysis.trace_arrays import attention, taken
from zarrtrace.analysis.traces import Data, traces
from zarrtrace.errors import ScenarioError, SharedTemplateWarning
from zarrtrace.scenarios import DECISION, split_trace_name

# In the order of the result.
_COLUMNS = (
    *("place", "layer", "feature", "mean_a", "mean_b", "difference", "hedges_g", "g_low", "g_high"),
    *("cohens_d", "constant_a", "constant_b", "t", "p_permutation", "q_permutation"),
    *("p_distribution", "p_familywise", "p_welch", "q_welch", "n_a", "n_b"),
)
_FLAGS = ("constant_a", "constant_b")
_METHOD = (
    "difference of group means over scenarios or blocks; Cohen's d by the pooled standard "
    "deviation (Cohen 1988); Hedges' g (1981) with the 95 % interval of the noncentral t "
    "distribution; Welch's t (1947); two-sided permutation p-value of the studentised difference "
    "(Janssen 1997; Phipson & Smyth 2010); q by Benjamini & Hochberg (1995) over all tests of this "
    "call; p_distribution by the permutation distribution of the largest studentised difference "
    "(Westfall & Young 1993); p_familywise its maximum with Bonferroni's p of t with the degrees "
    "of freedom of the smaller group (Mickey & Brown 1966)"
)


def contrast(
    data: xr.DataTree | xr.Dataset,
    group_a: Group | None = None,
    group_b: Group | None = None,
    at: Place | Sequence[Place] | None = None,
    *,
    by: str | None = None,
    block: Block | None = None,
    what: Literal["features", "attention"] = "features",
    target: Place = DECISION,
    heads: Literal["mean", "each"] = "mean",
    min_scenarios: int = 1,
    n_permutations: int = DEFAULT_PERMUTATIONS,
    seed: int = 0,
) -> xr.Dataset:
    """Compare two groups of scenarios: which features, or which attention, separate them.

    A scenario is one observation, or a block of scenarios is: activations are averaged over the
    tokens of a place, attention over its pairs of tokens.

    Parameters
    ----------
    data
        A run; for features also a table.
    group_a, group_b
        A tag, or names of scenarios; at least two a group, none in both. With `by`, a value of
        that column each. One or both are found without being given if the run has two tags alone;
        both if `by` has two values, in ascending order (False, True).
    at
        For features: the places to compare, ``"decision"`` if None. For attention: the places
        attended to, every span but `target` if None.
    by
        A column of metadata: scenarios belong to the group whose value they have there. Those
        whose value is missing belong to none.
    block
        A column of metadata, or one label a scenario in the run's order: scenarios of one block
        (a template, a game, a subject) are not independent, and count as one observation.
    what
        ``"features"`` by layer and place, or ``"attention"`` from `target` to each place by layer.
    target
        For attention: the tokens that attend.
    heads
        For attention: the mean over heads, or each one.
    min_scenarios
        Test only features active in at least this number of scenarios, of any group; a
        feature that is active in none cannot differ and is never tested.
    n_permutations
        Permutations to draw where there are more than 10,000 groupings; below that, every one is
        tried and the p-value is exact (252 for 5 against 5).
    seed
        Seed of the permutations drawn.

    Returns
    -------
    xr.Dataset
        ``mean_a``, ``mean_b``, ``difference`` (a − b), ``cohens_d``; ``hedges_g``, d without its
        bias, and its 95 % interval ``g_low``, ``g_high``; ``constant_a``, ``constant_b``, whether
        all values of that group are equal: d and g then say little, and are NaN if both are;
        ``t``, ``p_welch``, ``q_welch``, ``p_permutation``, ``q_permutation``, ``p_distribution``,
        ``p_familywise``, ``n_a``, ``n_b``. For features along ``row``, with coordinates ``place``,
        ``layer``, ``feature``: a table of those tested, smallest p and largest g first. For
        attention ``(source, layer)`` or ``(source, layer, head)``. A scenario that lacks a span or
        a layer does not count there; what has fewer than two observations a group is left out
        (attention: NaN) and named in ``attrs["not_tested"]``. Computed at the call, scenario by
        scenario, keeping active features only.

        ``attrs["findings"]`` answers the question in a sentence, ``attrs["limits"]`` says what
        groups of this size can show at best: ``smallest_p`` (5 against 5: 2/252 = 0.0079),
        ``n_tests``, ``smallest_q_alone`` (the least q that a feature can reach if no other one
        does as well), ``needed_at_smallest_p`` (how many must reach the smallest p together for
        q ≤ 0.05) and ``least_g`` (the least g with p_familywise ≤ 0.05).

    Raises
    ------
    ScenarioError
        If a group names no scenario, is too small, overlaps the other, or no scenario has a span;
        if there is no column `by` or `block`, `by` has other than two values and no groups are
        given, or there are fewer than two blocks to compare.
    ConfigError
        If a trace lacks the array, the target's rows of attention were not stored, or no groups
        are given and the run has other than two tags.

    Warns
    -----
    SharedTemplateWarning
        Without `block`, if scenarios are variants of a few templates.

    Notes
    -----
    The null of `p_permutation`, `q_permutation` and `p_distribution` is that both groups have one
    distribution: observations are exchanged between the groups, and the p-values are exact. They
    can be small where only the spread differs. `p_familywise` tests for a difference of means
    in a family of tests: it holds under exchange, and for normal values whatever the spread of each
    group. Studentising alone does not achieve that: in groups of one size Welch's t is the pooled
    t, and at 10 against 10 a standard deviation four times the other made one call in three report
    a difference. `q_welch` is NaN below 20 observations a group: with 1,000 tests of normal values
    Welch's p reports some difference in 0.25 of the calls at 4 against 12, in 0.15 at 8 against 24.

    An observation is a scenario, without `block`; the repeats of a scenario are a block, as when
    `by` is ``"choice"``: the option that each chose. If all scenarios of a block are in one group,
    the observation is the block's mean, and whole blocks are exchanged. If blocks have scenarios
    of both groups, the observation is a block's difference of group means, and the groups are
    exchanged in whole blocks (signs); blocks with one group alone are left out, t is that of the
    paired t-test, and d is in standard deviations of the differences.
    """
    if what != "features":
        traces(data)  # says that a table has no attention
    groups = groups_of(data, group_a, group_b, by)
    chosen = (*groups.a, *groups.b)
    if at is None:
        at = DECISION if what == "features" else _other_spans(data, target)
    places = as_places(at)[0]
    require_places(data, places if what == "features" else [*places, target])
    family = Family(exchange_of(data, groups, block), n_permutations, seed)
    note = "" if block is not None else _template_note(data, groups)
    if what == "features":
        out = _feature_contrast(data, chosen, places, family, min_scenarios)
    else:
        runs = traces(data)
        out = _attention_contrast([runs[name] for name in chosen], places, target, heads, family)
    out = described(
        out,
        data,
        "contrast",
        _METHOD,
        what=what,
        **({"by": by} if by is not None else {}),
        **({"block": block} if block is not None else {}),
        group_a=list(groups.a),
        group_b=list(groups.b),
        at=[label(place) for place in places],
        **({"target": label(target), "heads": heads} if what == "attention" else {}),
        **({"min_scenarios": min_scenarios} if what == "features" else {}),
        n_permutations=n_permutations,
        seed=seed,
    )
    return out.assign_attrs(claims(out, family.design, groups, note))


def _other_spans(data: Data, target: Place) -> list[Place]:
    seen = {*spans_before(data, [target]), DECISION}
    return [name for name in span_names(data) if name != target and name in seen]


def _template_note(data: Data, groups: Groups) -> str:
    """Say which scenarios share a template, and warn if exchanging them is not sound."""
    # Repeats share their prompt, and are exchanged within it, or with it.
    names = (*groups.a, *groups.b)
    chosen = tuple({split_trace_name(name)[0]: name for name in names}.values())
    number = number_of_templates(data, chosen)
    if number is None:
        return (
            "Prompts are not stored here: whether scenarios are variants of few templates, which "
            "p-values do not allow for without block=, was not looked at."
        )
    if number == len(chosen):
        return ""
    if number == 1:
        return (
            f"All {len(chosen)} scenarios are variants of one template: the result is about its "
            "prompts, and cannot say whether others would differ."
        )
    note = (
        f"The {len(chosen)} scenarios are variants of {number} templates, and were compared as if "
        "they were independent: p-values are too small if templates differ."
    )
    warnings.warn(
        SharedTemplateWarning(
            f"{note} Give block= (--block) a column of metadata that names the template."
        ),
        stacklevel=3,
    )
    return note


# --- features ----------------------------------------------------------------------------------


def _feature_contrast(
    data: Data,
    chosen: Sequence[str],
    places: Sequence[Place],
    family: Family,
    min_scenarios: int,
) -> xr.Dataset:
    tables: list[pd.DataFrame] = []
    extremes: dict[bytes, tuple[list[int], list[TwoGroups]]] = {}
    tested: list[tuple[tuple[int, int], np.ndarray, np.ndarray]] = []

    def columns() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for key, active in active_features(data, chosen, places):
            rows = np.zeros(len(chosen), bool)
            rows[active.known] = True
            if not family.testable(rows):
                family.not_tested += (f"layer {key[1]} at {label(places[key[0]])}",)
                continue
            for features, values in side_by_side(active, rows, min_scenarios):
                tested.append((key, rows, features))
                yield values, rows

    for found, (key, rows, features) in zip(family.tests(columns()), tested, strict=True):
        numbers, kept = extremes.setdefault(rows.tobytes(), ([], []))
        numbers.append(len(tables))
        kept.append(found)
        tables.append(_rows_of(found, key, features, family.sizes(rows)))
    if not tables:
        raise ScenarioError(
            "nothing to compare: no feature is active at "
            + " or ".join(label(place) for place in places)
            + f" in layers that two {family.exchange.unit} of each group have",
            why="; ".join(family.not_tested[:3]),
            remedy="Choose other places or groups, or complete the run.",
        )
    for numbers, kept in extremes.values():
        largest = np.max([found.extreme for found in kept], axis=0)
        for number, found in zip(numbers, kept, strict=True):
            # Sets of scenarios that differ are corrected for by Bonferroni.
            p = familywise(found.statistic, largest) * len(extremes)
            tables[number]["p_distribution"] = np.minimum(p, 1)
    return _sorted_table(pd.concat(tables, ignore_index=True), places)


def _rows_of(
    found: TwoGroups, key: tuple[int, int], features: np.ndarray, sizes: tuple[int, int]
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "place": key[0],
            "layer": key[1],
            "feature": features.astype(np.int64),
            **columns_of(found),
            "difference": found.mean_a - found.mean_b,
            "p_familywise": found.p_unequal,  # corrected when the number of tests is known
            "n_a": sizes[0],
            "n_b": sizes[1],
        }
    )


def _sorted_table(table: pd.DataFrame, places: Sequence[Place]) -> xr.Dataset:
    """Correct for all tests; smallest p first, then the largest effect that is known."""
    table["place"] = np.array([label(place) for place in places], dtype=object)[table["place"]]
    columns = {str(name): table[name].to_numpy() for name in table}
    table["p_familywise"] = corrected_familywise(
        columns["p_distribution"], columns["p_familywise"], len(table)
    )
    table["q_welch"] = corrected_welch(columns["p_welch"], columns["n_a"], columns["n_b"])
    table["q_permutation"] = corrected(columns["p_permutation"])
    strength = np.nan_to_num(np.abs(columns["hedges_g"]))
    order = np.lexsort((-strength, columns["p_permutation"]))
    table = table[list(_COLUMNS)].iloc[order].reset_index(drop=True).rename_axis("row")
    out = xr.Dataset.from_dataframe(table).set_coords(["place", "layer", "feature"])
    return out.assign_coords(place=("row", table["place"].to_numpy(dtype=object)))


# --- attention ---------------------------------------------------------------------------------


def _attention_contrast(
    chosen: Sequence[xr.Dataset],
    places: Sequence[Place],
    target: Place,
    heads: Literal["mean", "each"],
    family: Family,
) -> xr.Dataset:
    whole = xr.concat(
        [_attention(ds, places, target, heads) for ds in chosen],
        dim="scenario",
        join="outer",
        coords="minimal",
        compat="override",
    )
    whole = whole.transpose("scenario", ...)
    values = np.asarray(whole).reshape(len(chosen), -1).astype(np.float64)
    dims, shape = whole.dims[1:], whole.shape[1:]
    columns = {
        name: np.full(values.shape[1], np.nan)
        for name in (*STATISTICS, "p_distribution", "p_familywise", "n_a", "n_b")
    }
    sets = list(same_rows(~np.isnan(values)))
    tested = [(rows, which) for rows, which in sets if family.testable(rows)]
    for rows, which in sets:
        columns["n_a"][which], columns["n_b"][which] = family.sizes(rows)
    compared = family.tests((values[np.ix_(rows, which)], rows) for rows, which in tested)
    for found, (_, which) in zip(compared, tested, strict=True):
        for name, values_of in columns_of(found).items():
            columns[name][which] = values_of
        p = familywise(found.statistic, found.extreme) * len(tested)
        columns["p_distribution"][which] = np.minimum(p, 1)
        columns["p_familywise"][which] = found.p_unequal
    if not tested:
        raise ScenarioError(
            f"nothing to compare: no attention that two {family.exchange.unit} of each group have",
            why=f"Spans {', '.join(map(label, places))} or layers are missing in too many.",
            remedy="Choose other places or groups, or complete the run.",
        )
    columns["difference"] = columns["mean_a"] - columns["mean_b"]
    number = int(np.isfinite(columns["p_permutation"]).sum())
    columns["p_familywise"] = corrected_familywise(
        columns["p_distribution"], columns["p_familywise"], number
    )
    columns["q_welch"] = corrected_welch(columns["p_welch"], columns["n_a"], columns["n_b"])
    columns["q_permutation"] = corrected(columns["p_permutation"])
    out = xr.Dataset(
        {name: (dims, columns[name].reshape(shape)) for name in _COLUMNS[3:]},
        coords={str(dim): whole[dim] for dim in dims},
    )
    for name, kind in (("n_a", np.int64), ("n_b", np.int64), *((n, bool) for n in _FLAGS)):
        out[name] = out[name].fillna(0).astype(kind)
    gone = out["n_a"].where(out["n_b"] >= 2, 0) < 2
    gone = gone.any("head") if "head" in gone.dims else gone
    family.not_tested = tuple(
        f"layer {layer} to {source}" for source, layer in gone.to_series()[lambda flag: flag].index
    )
    return out


def _attention(
    ds: xr.Dataset, places: Sequence[Place], target: Place, heads: Literal["mean", "each"]
) -> xr.DataArray:
    """Mean attention from the target to each place ``(source, layer[, head])``, loaded."""
    stays = ["layer"] if heads == "mean" else ["layer", "head"]
    bare = attention(ds, heads)
    absent = xr.full_like(bare.isel(query=0, key=0, drop=True), np.nan, dtype=np.float64)
    reachable = not isinstance(target, str) or has_span(ds, target)
    if reachable:
        require_queries(ds, positions(ds, target))
    found = [
        taken(bare, query=positions(ds, target), key=positions(ds, place)).mean(
            ["query", "key"], dtype=np.float64, skipna=False
        )
        if reachable and (not isinstance(place, str) or has_span(ds, place))
        else absent
        for place in places
    ]
    source = xr.DataArray([label(place) for place in places], dims="source", name="source")
    together = xr.concat(found, dim=source, coords="minimal", compat="override")
    return together.transpose("source", *stays).load()
