"""What separates one group of scenarios from another."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.blocks import blocks
from zarrtrace.analysis.parallel import OfLayer, each_layer, together
from zarrtrace.analysis.resampling import (
    DEFAULT_PERMUTATIONS,
    TwoGroups,
    corrected,
    familywise,
    same_rows,
    two_groups,
)
from zarrtrace.analysis.selecting import (
    Data,
    Place,
    as_places,
    attention,
    described,
    has_span,
    label,
    metadata,
    positions,
    require_places,
    require_queries,
    scenario_names,
    scenario_tags,
    span_names,
    taken,
    traces,
)
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.scenarios import DECISION, is_missing
from zarrtrace.suggestions import did_you_mean

Group = str | Sequence[str]
Value = bool | int | float | str

_STATISTICS = ("mean_a", "mean_b", "cohens_d", "t", "p_welch", "p_permutation")
_METHOD = (
    "difference of group means over scenarios; Cohen's d by the pooled standard deviation (Cohen "
    "1988); Welch's t (1947); two-sided permutation p-value of the absolute difference of means "
    "(Phipson & Smyth 2010); q by Benjamini & Hochberg (1995) over all tests of this call; "
    "p_familywise by the permutation distribution of the largest standardised difference "
    "(Westfall & Young 1993)"
)


def contrast(
    data: xr.DataTree | xr.Dataset,
    group_a: Group | Value | None = None,
    group_b: Group | Value | None = None,
    at: Place | Sequence[Place] | None = None,
    *,
    by: str | None = None,
    what: Literal["features", "attention"] = "features",
    target: Place = DECISION,
    heads: Literal["mean", "each"] = "mean",
    min_scenarios: int = 1,
    n_permutations: int = DEFAULT_PERMUTATIONS,
    seed: int = 0,
) -> xr.Dataset:
    """Compare two groups of scenarios: which features, or which attention, separate them.

    A scenario is one observation: activations are averaged over the tokens of a place, attention
    over its pairs of tokens.

    Parameters
    ----------
    data
        A run; for features also a table.
    group_a, group_b
        A tag, or names of scenarios; at least two a group, none in both. With `by`, a value of
        that column each; without them, its only two values in ascending order (False, True).
    at
        For features: the places to compare, ``"decision"`` if None. For attention: the places
        attended to, every span but `target` if None.
    by
        A column of metadata: scenarios belong to the group whose value they have there. Those
        whose value is missing belong to none.
    what
        ``"features"`` by layer and place, or ``"attention"`` from `target` to each place by layer.
    target
        For attention: the tokens that attend.
    heads
        For attention: the mean over heads, or each one.
    min_scenarios
        Test only features active in at least so many of the scenarios, whichever their group; a
        feature that is active in none cannot differ and is never tested.
    n_permutations
        Permutations to draw where there are more than 10,000 groupings; below that, every one is
        tried and the p-value is exact (252 for 5 against 5).
    seed
        Of the permutations drawn.

    Returns
    -------
    xr.Dataset
        ``mean_a``, ``mean_b``, ``difference`` (a − b), ``cohens_d``, ``t``, ``p_welch``,
        ``q_welch``, ``p_permutation``, ``q_permutation``, ``p_familywise``, ``n_a``, ``n_b``.
        For features along ``row``, with coordinates ``place``, ``layer``, ``feature``: a table of
        those tested, smallest p and largest effect first. For attention ``(source, layer)`` or
        ``(source, layer, head)``. A scenario that lacks a span or a layer does not count there;
        what has fewer than two scenarios a group is left out (attention: NaN) and named in
        ``attrs["not_tested"]``. Infinite d: neither group varies; then t is NaN.
        Computed at the call, scenario by scenario, keeping active features only.

        ``attrs`` state the limits of small groups: ``smallest_p`` (5 against 5: 2/252 = 0.0079),
        ``n_tests``, ``smallest_q_alone`` (the least q that a feature can reach if no other one
        does as well) and ``needed_at_smallest_p`` (how many must reach the smallest p together for
        q ≤ 0.05). `p_familywise` has no such floor but `smallest_p` itself.

    Raises
    ------
    ScenarioError
        If a group names no scenario, is too small, overlaps the other, or no scenario has a span;
        if there is no column `by`, or it has other than two values and no groups are given.
    ConfigError
        If a trace lacks the array, or the target's rows of attention were not stored.
    """
    if what != "features":
        traces(data)  # says that a table has no attention
    names_a, names_b = _groups(data, group_a, group_b, by)
    _check_groups(names_a, names_b)
    chosen = (*names_a, *names_b)
    in_a = np.arange(len(chosen)) < len(names_a)
    if at is None:
        at = DECISION if what == "features" else _other_spans(data, target)
    places = as_places(at)[0]
    require_places(data, places if what == "features" else [*places, target])
    plan = _Plan(in_a, n_permutations, seed)
    if what == "features":
        out = _feature_contrast(data, chosen, places, plan, min_scenarios)
    else:
        runs = traces(data)
        out = _attention_contrast([runs[name] for name in chosen], places, target, heads, plan)
    out = described(
        out,
        data,
        "contrast",
        _METHOD,
        what=what,
        **({"by": by} if by is not None else {}),
        group_a=list(names_a),
        group_b=list(names_b),
        at=[label(place) for place in places],
        **({"target": label(target), "heads": heads} if what == "attention" else {}),
        **({"min_scenarios": min_scenarios} if what == "features" else {}),
        n_permutations=n_permutations,
        seed=seed,
    )
    return out.assign_attrs(_limits(out, plan))


@dataclass
class _Plan:
    """Groups, permutations, and the family of tests they make."""

    in_a: np.ndarray
    n_permutations: int
    seed: int
    smallest_p: float = 1.0
    exact: bool = True
    not_tested: tuple[str, ...] = ()

    def testable(self, rows: np.ndarray) -> bool:
        """Tell whether both groups keep two of these scenarios."""
        return bool((rows & self.in_a).sum() >= 2 and (rows & ~self.in_a).sum() >= 2)

    def tests(self, columns: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[TwoGroups]:
        """Compare the groups in columns of values, each with the scenarios it has values of."""
        calls = (
            partial(
                two_groups,
                values,
                self.in_a[rows],
                n_permutations=self.n_permutations,
                seed=self.seed,
            )
            for values, rows in columns
        )
        for found in together(calls):
            self.smallest_p = min(self.smallest_p, found.smallest_p)
            self.exact &= found.exact
            yield found

    def sizes(self, rows: np.ndarray) -> tuple[int, int]:
        """Return how many scenarios each group has."""
        return int((rows & self.in_a).sum()), int((rows & ~self.in_a).sum())


# --- groups ------------------------------------------------------------------------------------


def _groups(
    data: Data, group_a: Any, group_b: Any, by: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Name the scenarios of both groups."""
    if by is None:
        if not all(isinstance(one, str | Sequence) for one in (group_a, group_b)):
            raise ConfigError(
                "contrast needs two groups",
                remedy="Give two tags, two lists of scenarios, or by= a column of metadata.",
            )
        return _members(data, group_a), _members(data, group_b)
    columns = metadata(data)
    if by not in columns:
        raise ScenarioError(
            f"the run has no column of metadata {by!r}",
            remedy=did_you_mean(by, columns, label="It has"),
        )
    column = columns[by]
    names = np.array(scenario_names(data), dtype=object)
    values = [one for one in np.unique(column).tolist() if one != "" and not is_missing(one)]
    given = [one for one in (group_a, group_b) if one is not None]
    unknown = [one for one in given if not isinstance(one, Value) or one not in values]
    if unknown or len(given) == 1 or (not given and len(values) != 2):
        shown = ", ".join(map(repr, values[:10])) + (", …" if len(values) > 10 else "")
        problem = f"has {len(values)} values"
        if given:
            problem = f"has no value {unknown[0]!r}" if unknown else "needs a second value"
        raise ScenarioError(
            f"metadata {by!r} {problem}",
            why=f"Its values are: {shown or 'all missing'}.",
            remedy="Give two of them as group_a and group_b.",
        )
    a, b = given or values
    return tuple(names[column == a]), tuple(names[column == b])


def _members(data: Data, group: Any) -> tuple[str, ...]:
    tagged = scenario_tags(data)
    if isinstance(group, str):
        found = tuple(name for name, own in tagged.items() if group in own)
        if not found:
            known = sorted({tag for own in tagged.values() for tag in own})
            raise ScenarioError(
                f"no scenario has the tag {group!r}",
                why="A group is a tag, or a list of names of scenarios.",
                remedy=did_you_mean(group, known, label="Tags there are"),
            )
        return found
    absent = [name for name in group if name not in tagged]
    if absent:
        raise ScenarioError(
            f"the run has no scenario {absent[0]!r}",
            remedy=did_you_mean(absent[0], tagged, label="It has"),
        )
    return tuple(dict.fromkeys(group))


def _check_groups(a: Sequence[str], b: Sequence[str]) -> None:
    others = set(b)
    both = [name for name in a if name in others]
    if both:
        raise ScenarioError(
            f"scenario {both[0]!r} is in both groups", remedy="Leave it out of one of them."
        )
    for name, group in (("A", a), ("B", b)):
        if len(group) < 2:
            raise ScenarioError(
                f"group {name} has {len(group)} scenario(s): {', '.join(group) or 'none'}",
                why="A variance needs at least two.",
                remedy="Extract more scenarios, or choose a larger group.",
            )


def _other_spans(data: Data, target: Place) -> list[Place]:
    return [name for name in span_names(data) if name != target]


# --- features ----------------------------------------------------------------------------------

# Activations that are in memory at once, about: those of some layers, if there are many scenarios.
_AT_ONCE = 2**26
# Active features of a scenario at a place, at most, usually.
_OFTEN_ACTIVE = 256
# Values that are tested at once.
_TESTED = 2**22


class _Active(NamedTuple):
    """Mean activations that are not 0, of scenarios at one place and layer.

    Attributes
    ----------
    known
        Which scenarios have the place and the layer, by their place among those compared.
    row
        Place of the scenario, of each activation.
    feature, activation
        The others.
    """

    known: np.ndarray
    row: np.ndarray
    feature: np.ndarray
    activation: np.ndarray


def _feature_contrast(
    data: Data,
    chosen: Sequence[str],
    places: Sequence[Place],
    plan: _Plan,
    min_scenarios: int,
) -> xr.Dataset:
    tables: list[pd.DataFrame] = []
    extremes: dict[bytes, tuple[list[int], list[TwoGroups]]] = {}
    tested: list[tuple[tuple[int, int], np.ndarray, np.ndarray]] = []

    def columns() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for key, active in _active(data, chosen, places):
            rows = np.zeros(len(chosen), bool)
            rows[active.known] = True
            if not plan.testable(rows):
                plan.not_tested += (f"layer {key[1]} at {label(places[key[0]])}",)
                continue
            for features, values in _side_by_side(active, rows, min_scenarios):
                tested.append((key, rows, features))
                yield values, rows

    for found, (key, rows, features) in zip(plan.tests(columns()), tested, strict=True):
        numbers, kept = extremes.setdefault(rows.tobytes(), ([], []))
        numbers.append(len(tables))
        kept.append(found)
        tables.append(_rows_of(found, key, features, plan.sizes(rows)))
    if not tables:
        raise ScenarioError(
            "nothing to compare: no feature is active at "
            + " or ".join(label(place) for place in places)
            + " in layers that two scenarios of each group have",
            why="; ".join(plan.not_tested[:3]),
            remedy="Choose other places or groups, or complete the run.",
        )
    for numbers, kept in extremes.values():
        largest = np.max([found.extreme for found in kept], axis=0)
        for number, found in zip(numbers, kept, strict=True):
            # Sets of scenarios that differ are corrected for by Bonferroni.
            p = familywise(found.standardised, largest) * len(extremes)
            tables[number]["p_familywise"] = np.minimum(p, 1)
    table = pd.concat(tables, ignore_index=True)
    table["place"] = np.array([label(place) for place in places], dtype=object)[table["place"]]
    table["q_welch"] = corrected(table["p_welch"].to_numpy())
    table["q_permutation"] = corrected(table["p_permutation"].to_numpy())
    strength = table["cohens_d"].abs().to_numpy()
    order = np.lexsort((-strength, table["p_permutation"].to_numpy()))
    table = table.iloc[order].reset_index(drop=True).rename_axis("row")
    out = xr.Dataset.from_dataframe(table).set_coords(["place", "layer", "feature"])
    return out.assign_coords(place=("row", table["place"].to_numpy(dtype=object)))


def _active(
    data: Data, chosen: Sequence[str], places: Sequence[Place]
) -> Iterator[tuple[tuple[int, int], _Active]]:
    """Yield what is active by (number of the place, layer), some layers at a time."""
    numbers = {name: number for number, name in enumerate(scenario_names(data))}
    rows = {numbers[name]: row for row, name in enumerate(chosen)}
    layers = sorted({n for block in blocks(data, ["features"], (), rows) for n in block.layers})
    step = max(1, _AT_ONCE // (len(chosen) * len(places) * _OFTEN_ACTIVE))
    for start in range(0, len(layers), step):
        found: dict[tuple[int, int], list[_Active]] = {}
        for key, active in _active_of_layers(data, rows, places, layers[start : start + step]):
            found.setdefault(key, []).append(active)
        for key in sorted(found):
            yield key, _Active(*map(np.concatenate, zip(*found[key], strict=True)))


def _active_of_layers(
    data: Data, rows: Mapping[int, int], places: Sequence[Place], layers: Sequence[int]
) -> Iterator[tuple[tuple[int, int], _Active]]:
    """Yield what is active in some layers, block by block."""
    of_layers: deque[list[int]] = deque()  # of the blocks that are being read

    def jobs() -> Iterator[tuple[xr.DataArray, OfLayer[list[tuple[int, _Active]]]]]:
        for block in blocks(data, ["features"], (), rows):
            cells = [
                (place, rows[number], samples)
                for place, at in enumerate(places)
                for number, samples in block.rows(at).items()
                if number in rows
            ]
            here = [n for n in block.layers if n in layers]
            if not cells or not here:
                continue
            samples = np.unique(np.concatenate([at for _, _, at in cells]))
            places_of = [(place, row, np.searchsorted(samples, at)) for place, row, at in cells]
            of_layers.append(here)
            array = block.arrays["features"].assign_coords(
                layer=block.layers, sample=np.arange(block.starts[-1])
            )
            yield (
                taken(array, layer=here, sample=samples),
                partial(_active_of_layer, cells=places_of),
            )

    for by_layer in each_layer(jobs()):
        for layer, found in zip(of_layers.popleft(), by_layer, strict=True):
            for place, active in found:
                yield (place, layer), active


def _active_of_layer(
    layer: np.ndarray, _at: int, *, cells: Sequence[tuple[int, int, np.ndarray]]
) -> list[tuple[int, _Active]]:
    """Return what is active at each place of each scenario; nothing where it is missing."""
    found: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for place, row, samples in cells:
        if np.isnan(layer[samples[0], 0]):
            continue
        mean = layer[samples].mean(0, dtype=np.float64)
        active = np.flatnonzero(mean)
        found.setdefault(place, []).append((row, active.astype(np.int32), mean[active]))
    out = []
    for place, parts in found.items():
        known, features, values = zip(*parts, strict=True)
        counts = [len(one) for one in features]
        rows = np.repeat(np.array(known, np.int32), counts)
        merged = np.concatenate(features), np.concatenate(values)
        out.append((place, _Active(np.array(known), rows, *merged)))
    return out


def _side_by_side(
    active: _Active, rows: np.ndarray, min_scenarios: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield features active in enough scenarios ``(m,)`` and their values ``(n, m)``."""
    features, counts = np.unique(active.feature, return_counts=True)
    features = features[counts >= min_scenarios]
    number = np.cumsum(rows) - 1  # among the scenarios that are known
    step = max(1, _TESTED // int(rows.sum()))
    for start in range(0, len(features), step):
        some = features[start : start + step]
        kept = np.isin(active.feature, some)
        values = np.zeros((int(rows.sum()), len(some)))
        column = np.searchsorted(some, active.feature[kept])
        values[number[active.row[kept]], column] = active.activation[kept]
        yield some, values


def _rows_of(
    found: TwoGroups, key: tuple[int, int], features: np.ndarray, sizes: tuple[int, int]
) -> pd.DataFrame:
    statistics = {name: getattr(found, name) for name in _STATISTICS}
    return pd.DataFrame(
        {
            "place": key[0],
            "layer": key[1],
            "feature": features.astype(np.int64),
            **statistics,
            "difference": found.mean_a - found.mean_b,
            "n_a": sizes[0],
            "n_b": sizes[1],
        }
    )


# --- attention ---------------------------------------------------------------------------------


def _attention_contrast(
    chosen: Sequence[xr.Dataset],
    places: Sequence[Place],
    target: Place,
    heads: Literal["mean", "each"],
    plan: _Plan,
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
        for name in (*_STATISTICS, "p_familywise", "n_a", "n_b")
    }
    sets = list(same_rows(~np.isnan(values)))
    tested = [(rows, which) for rows, which in sets if plan.testable(rows)]
    for rows, which in sets:
        columns["n_a"][which], columns["n_b"][which] = plan.sizes(rows)
    compared = plan.tests((values[np.ix_(rows, which)], rows) for rows, which in tested)
    for found, (_, which) in zip(compared, tested, strict=True):
        for name in _STATISTICS:
            columns[name][which] = getattr(found, name)
        p = familywise(found.standardised, found.extreme) * len(tested)
        columns["p_familywise"][which] = np.minimum(p, 1)
    if not tested:
        raise ScenarioError(
            "nothing to compare: no attention that two scenarios of each group have",
            why=f"Spans {', '.join(map(label, places))} or layers are missing in too many.",
            remedy="Choose other places or groups, or complete the run.",
        )
    columns["difference"] = columns["mean_a"] - columns["mean_b"]
    columns["q_welch"] = corrected(columns["p_welch"])
    columns["q_permutation"] = corrected(columns["p_permutation"])
    out = xr.Dataset(
        {name: (dims, column.reshape(shape)) for name, column in columns.items()},
        coords={str(dim): whole[dim] for dim in dims},
    )
    for name in ("n_a", "n_b"):
        out[name] = out[name].astype(np.int64)
    gone = out["n_a"].where(out["n_b"] >= 2, 0) < 2
    gone = gone.any("head") if "head" in gone.dims else gone
    plan.not_tested = tuple(
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


# --- limits ------------------------------------------------------------------------------------


def _limits(out: xr.Dataset, plan: _Plan) -> dict[str, str | int | float]:
    """State what groups of this size can show at best."""
    n_tests = int(np.isfinite(out["p_permutation"]).sum())
    na, nb = int(plan.in_a.sum()), int((~plan.in_a).sum())
    alone = min(1.0, plan.smallest_p * n_tests)
    needed = max(1, math.ceil(plan.smallest_p * n_tests / 0.05 - 1e-9))
    groupings = f"all {math.comb(na + nb, na)}" if plan.exact else f"{plan.n_permutations} drawn"
    sentence = (
        f"{na} against {nb} scenarios, {groupings} permutations: no p_permutation or p_familywise "
        f"below {plan.smallest_p:.4g}. Of {n_tests} tests, one alone at that p has "
        f"q_permutation = {alone:.3g}; {needed} must reach it together for q <= 0.05. Welch's p "
        "has no such floor but assumes normal values, which sparse activations are not."
    )
    return {
        "n_a": na,
        "n_b": nb,
        "n_tests": n_tests,
        "permutations": groupings,
        "smallest_p": plan.smallest_p,
        "smallest_q_alone": alone,
        "needed_at_smallest_p": needed,
        "not_tested": "; ".join(plan.not_tested),
        "limits": sentence,
    }
