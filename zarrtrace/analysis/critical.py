"""Which layers attend to a span more than its place in the prompt explains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np
import xarray as xr

from zarrtrace.analysis.attention import Weights, weighted
from zarrtrace.analysis.resampling import MOST_EXACT, corrected, same_rows
from zarrtrace.analysis.selecting import (
    Data,
    Place,
    attention,
    described,
    has_span,
    is_run,
    label,
    per_scenario,
    positions,
    present,
    require,
    require_places,
    require_queries,
    scenario_of,
    span_names,
    token_labels,
    traces,
)
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

# Sums of the same numbers in another order differ by rounding, and must count as equal.
_TIE = 1e-9
_FEWEST = 2


def critical_layers(
    data: Data,
    spans: Sequence[str] | None = None,
    target: Place = DECISION,
    *,
    controls: int = 4,
    alpha: float = 0.05,
    least_ratio: float = 2.0,
    n_permutations: int = 9999,
    seed: int = 0,
) -> xr.Dataset:
    """Find the layers whose attention to a span stands out against its neighbourhood.

    Parameters
    ----------
    data
        A run of at least two scenarios: they are the sample.
    spans
        Spans to test; None takes all but the decision.
    target
        Whose attention it is; the mean over its tokens.
    controls
        Tokens that each token of a span is compared with: the nearest ones, before and behind,
        that are in no span, not the first token and not after the target. So they lie as far from
        the decision as the span does.
    alpha
        False discovery rate at which a layer is called critical.
    least_ratio
        How many times its controls' attention a span must get in a critical layer. Scenarios of
        one template put the same words in the same places, and words differ: a layer that gives
        one of them a hundredth more than its neighbours does so in every scenario, and passes any
        test.
    n_permutations, seed
        Of the permutations drawn where there are too many to try all.

    Returns
    -------
    xr.Dataset
        Loaded, ``(source, layer)`` by span: ``attention`` and ``control`` (means over scenarios,
        for one token), ``difference``, ``ratio`` (of the two means), ``cohens_d`` (mean difference
        by its standard deviation over scenarios: Cohen's d for pairs; infinite if it does not
        vary), ``p`` (two-sided sign-flip permutation test), ``q`` (Benjamini-Hochberg over all
        layers and spans), ``n`` scenarios, and ``critical``: q ≤ `alpha`, more attention than the
        controls, and at least `least_ratio` times as much. The attribute ``smallest_p`` is the
        least that so few scenarios can give.

    Raises
    ------
    ConfigError
        If there are fewer than two scenarios, no attention, or no token to compare with.
    ScenarioError
        If no scenario has a span.

    Notes
    -----
    Under the hypothesis that attention to the span and to its controls are exchangeable, each
    scenario's difference is as likely to have the other sign (Fisher 1935). With n scenarios the
    smallest p is 2/2ⁿ: at five or fewer, no layer can reach 0.05.
    """
    names = list(spans) if spans is not None else [n for n in span_names(data) if n != DECISION]
    _check(data, names, controls)
    require_places(data, [*names, target])
    of = partial(_span_and_controls, names=names, target=target, controls=controls)
    pair = per_scenario(data, of)
    pair = pair.reindex(source=names).compute().transpose("scenario", "source", "layer")
    own, other = pair["own"], pair["other"]
    difference = (own - other).to_numpy().reshape(own.sizes["scenario"], -1)
    columns, smallest = _test(difference, n_permutations, seed)
    shape = (own.sizes["source"], own.sizes["layer"])
    both = (own - other).notnull()
    out = xr.Dataset(
        {
            "attention": own.where(both).mean("scenario"),
            "control": other.where(both).mean("scenario"),
            **{
                name: (("source", "layer"), column.reshape(shape))
                for name, column in columns.items()
            },
        },
        coords={"source": own["source"], "layer": own["layer"]},
    ).drop_attrs()
    out["n"] = out["n"].astype(np.int64)
    out["ratio"] = (out["attention"] / out["control"]).where(out["control"] > 0)
    much = out["attention"] >= least_ratio * out["control"]
    out["critical"] = (out["q"] <= alpha) & (out["difference"] > 0) & much
    return described(
        out.assign_attrs(smallest_p=smallest),
        data,
        "critical_layers",
        "attention to a span's tokens less that to the nearest tokens outside spans, paired over "
        "scenarios; sign-flip permutation test (Fisher 1935), Benjamini-Hochberg (1995)",
        spans=names,
        target=target,
        controls=controls,
        alpha=alpha,
        least_ratio=least_ratio,
        n_permutations=n_permutations,
        seed=seed,
    )


def _check(data: Data, names: Sequence[str], controls: int) -> None:
    number = len(traces(data)) if is_run(data) else 1
    if number < _FEWEST:
        raise ConfigError(
            "critical_layers needs a run of at least two scenarios",
            why="Scenarios are the sample whose differences are tested.",
            remedy="Give the run; attention_to measures a single trace.",
        )
    if controls < 1 or not names:
        raise ConfigError(
            f"nothing to compare: {len(names)} spans, {controls} controls",
            remedy="Give at least one of each.",
        )


def control_tokens(ds: xr.Dataset, span: str, target: Place, controls: int) -> list[list[int]]:
    """Return, for each token of a span, the nearest tokens that are in no span.

    Raises
    ------
    ConfigError
        If there is no such token.
    """
    free = _free_tokens(ds, target)
    if not len(free):
        raise ConfigError(
            f"{scenario_of(ds)}: no token to compare {span!r} with",
            why="Every token before the target is in a span, or is the first.",
            remedy="Leave this scenario out; its prompt has nothing but spans.",
        )
    # Nearest first; of two as near, the one behind: it is the later one that attention favours.
    return [
        sorted(free[np.lexsort((-free, np.abs(free - token)))][:controls].tolist())
        for token in positions(ds, span)
    ]


def _free_tokens(ds: xr.Dataset, target: Place) -> np.ndarray:
    """Return the positions up to the target that are in no span, but for the first."""
    tokens, targets = token_labels(ds), positions(ds, target)
    taken = {int(tokens[0]), *targets}
    for name in span_names(ds):
        taken.update(positions(ds, name))
    return np.array([t for t in tokens.tolist() if t not in taken and t <= max(targets)], np.int64)


def _span_and_controls(
    ds: xr.Dataset, names: Sequence[str], target: Place, controls: int
) -> xr.Dataset | None:
    """Return mean attention ``(source, layer)`` to each span's tokens and to their controls."""
    require(ds, "attention_mean")
    here = [name for name in names if has_span(ds, name)]
    if not here or not present(ds, [target]):
        return None
    queries = positions(ds, target)
    require_queries(ds, queries)
    compared = [(positions(ds, name), control_tokens(ds, name, target, controls)) for name in here]
    keys = token_labels(ds)
    values = np.zeros((2, len(here), len(keys)))
    for row, (tokens, nearest) in enumerate(compared):
        for token, others in zip(tokens, nearest, strict=True):
            values[0, row, keys == token] = 1 / len(tokens)
            # A control that is near to several of the span's tokens counts for each of them.
            values[1, row, np.isin(keys, others)] += 1 / len(tokens) / len(others)
    used = values.any((0, 1))
    rows = Weights(
        [label(target)], np.asarray(queries), np.full((1, len(queries)), 1 / len(queries))
    )
    columns = Weights(2 * here, keys[used], values[..., used].reshape(2 * len(here), -1))
    found = weighted(attention(ds, "mean"), rows, columns).isel(target=0, drop=True)
    own, other = slice(len(here)), slice(len(here), None)
    return xr.Dataset({"own": found.isel(source=own), "other": found.isel(source=other)})


def _test(
    differences: np.ndarray, n_permutations: int, seed: int
) -> tuple[dict[str, np.ndarray], float]:
    """Return statistics of each column of ``(scenario, column)``, and the smallest p there is."""
    present = ~np.isnan(differences)
    columns = {
        name: np.full(differences.shape[1], np.nan) for name in ("difference", "cohens_d", "p")
    }
    smallest = 1.0
    for rows, which in same_rows(present):
        if rows.sum() < _FEWEST:
            continue
        values = differences[np.ix_(rows, which)]
        mean, spread = values.mean(0), values.std(0, ddof=1)
        columns["difference"][which] = mean
        with np.errstate(divide="ignore", invalid="ignore"):
            columns["cohens_d"][which] = mean / np.where(np.ptp(values, axis=0) == 0, 0, spread)
        columns["p"][which], least = sign_flips(values, n_permutations, seed)
        smallest = min(smallest, least)
    columns["q"] = corrected(columns["p"])
    columns["n"] = present.sum(0)
    return columns, smallest


def sign_flips(values: np.ndarray, n_permutations: int, seed: int) -> tuple[np.ndarray, float]:
    """Test whether the mean of each column ``(n, m)`` is 0, by flipping the rows' signs.

    Returns
    -------
    p
        ``(m,)`` two-sided; exact if all 2ⁿ flips are at most 10,000.
    smallest
        The smallest p that there can be.
    """
    n = len(values)
    if 2**n <= MOST_EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        drawn = np.random.default_rng(seed).choice((1.0, -1.0), (n_permutations, n))
        signs = np.vstack([np.ones(n), drawn])
    observed = np.abs(values.sum(0))
    tolerance = _TIE * np.abs(values).sum(0)
    reached = np.abs(signs @ values) >= observed - tolerance
    return reached.mean(0), (2 if 2**n <= MOST_EXACT else 1) / len(signs)
