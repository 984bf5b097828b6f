"""Linear probes of each layer, tested on held-out prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from zarrtrace.analysis.crossvalidation import (
    Rows,
    logistic,
    out_of_fold,
    require_sklearn,
    ridge,
)
from zarrtrace.analysis.layer_samples import probed_array, read_rows, samples_of
from zarrtrace.analysis.probe_plans import Plan, make_plan, require_groups, require_values
from zarrtrace.analysis.results import described
from zarrtrace.analysis.samples import At
from zarrtrace.analysis.scores import interval, resampled
from zarrtrace.analysis.tables import SAMPLE
from zarrtrace.analysis.targets import described_values
from zarrtrace.analysis.traces import Data
from zarrtrace.errors import ConfigError

#: Features that a probe takes at most: those that most training samples have.
DEFAULT_FEATURES = 4096
DEFAULT_FOLDS = 5
DEFAULT_PERMUTATIONS = 999

# Equal squared errors differ by the rounding of their sums.
_TIE = 1e-9
_SIGNIFICANT = 0.05
_METHOD = (
    "prediction out of fold, folds of whole groups; numbers by ridge regression (Hoerl & Kennard "
    "1970), two values by logistic regression with a ridge penalty; columns, scales and penalty "
    "chosen in the training samples, the penalty in 3 folds of groups; p by permutation of the "
    "target with all probes trained again (Ojala & Garriga 2010), with confounds of its residuals "
    "(Freedman & Lane 1983), familywise over layers by the largest statistic (Westfall & Young "
    "1993); intervals by the bootstrap over groups, with Student's t, corrected for overlapping "
    "folds (Nadeau & Bengio 2003)"
)


def probe(
    samples: Data,
    target: str | xr.DataArray,
    *,
    what: str = "residual",
    layers: Sequence[int] | None = None,
    at: At | None = None,
    groups: str | None = None,
    confounds: Sequence[str] = (),
    folds: int = DEFAULT_FOLDS,
    n_permutations: int = DEFAULT_PERMUTATIONS,
    n_features: int = DEFAULT_FEATURES,
    seed: int = 0,
) -> xr.Dataset:
    """Predict a number or one of two values from each layer, out of fold.

    Needs scikit-learn: ``pip install '.[probe]'``. Reads one layer at a time.

    Parameters
    ----------
    samples
        A table; of a run or a trace, the samples `at`.
    target
        A column: metadata, or another coordinate along ``sample``; or an array of one value a
        sample, as ``samples.balance > 50``. A column with exactly two values is classified, any
        other must hold numbers. Samples without a value are left out.
    what
        ``"residual"``, ``"features"`` or ``"features_NAME"``.
    layers
        Which, all if None.
    at
        Places whose samples are taken, as for :func:`zarrtrace.table`; if None all of a table, the
        last tokens of a run.
    groups
        A column: samples with one value of it are never in both the training and the held-out
        part. The scenario if None, together with its repeats. Name the template, the game or the
        document that prompts share.
    confounds
        Columns that the target may be predicted from anyway. A probe of these alone is the
        baseline; `improvement` and `p` are about what the layer adds. Text is one indicator a
        value. Their relation to the target is taken to be linear.
    folds
        Number of folds, at most that of groups.
    n_permutations
        Permutations of the target. 0: none, and no p.
    n_features
        Number of features, those that are active in most training samples.
    seed
        Seed of folds, permutations and resampled groups.

    Returns
    -------
    xr.Dataset
        By ``layer``:

        ``score``
            Out of fold: R² of numbers (``r2_score`` of scikit-learn); of two values the area under
            the ROC curve over pairs of samples in one fold. ``low`` and ``high``: 95 % interval.
        ``accuracy``
            With two values: the share that is on the right side of 0.5.
        ``baseline``
            Score of the confounds alone; without any, that of the training samples' mean.
        ``score_with_confounds``
            Score of layer and confounds together, if there are confounds.
        ``improvement``
            Gain of the layer over the baseline: the score (with confounds) − `baseline`.
            With confounds, ``improvement_low`` and ``improvement_high``: 95 % interval.
        ``statistic``
            The share of the baseline's squared error that a ridge probe removes out of fold, of two
            values as 0 and 1. `p` is about it.
        ``p``, ``p_familywise``
            One-sided permutation p of the layer, and over all layers of the result.
        ``n_samples``, ``n_groups``
            That were used.

        ``prediction (layer, sample)``: out of fold; of two values the probability of the second.
        ``fold (sample)``: −1 where a sample is left out. NaN: a layer that has too few samples,
        named in ``attrs["not_tested"]``.

    Raises
    ------
    ScenarioError
        If there is no such column.
    ConfigError
        If scikit-learn or the array is missing; the target does not vary, or is text of more than
        two values; a scenario is in several groups; there are fewer groups than folds; or a class
        is in one fold only.

    Notes
    -----
    Null hypothesis: the layer says nothing about the target beyond the confounds. Unit of exchange:
    the group, if all samples of each group have the same target; else the sample within its group,
    and then p is about differences within groups only, and samples of a group are taken to be
    exchangeable. All probes are trained again for each permutation. With two values that is done by
    ridge regression on 0 and 1, because all permutations share its one factorisation;
    ``score`` is the logistic one's.

    The floor of p is ``1 / (n_permutations + 1)``, or one by the number of distinct permutations
    where there are fewer: 3 groups against 3 give 0.1. ``attrs["smallest_p"]`` states it.

    The interval is about probes trained on as many other groups; of 20 groups it covered their
    expected score in 94 % of simulated draws (``README.md``). The best of many layers scores
    better than it would again: ``p_familywise`` accounts for that, the interval does not.

    Examples
    --------
    >>> found = zt.analysis.probe(samples, "balance", groups="game", confounds=["round"])
    """
    require_sklearn()
    rows = samples_of(samples, at)
    array = probed_array(rows, what, layers)
    plan = make_plan(rows, target, groups, confounds, folds, n_permutations, seed)
    found: dict[int, _Layer] = {}
    refused: dict[int, ConfigError] = {}
    for layer in array.indexes["layer"].tolist():
        try:
            found[layer] = _probe_layer(array.sel(layer=layer), plan, n_features)
        except ConfigError as error:
            refused[layer] = error
    if not found:
        raise next(iter(refused.values()))
    out = _result(rows, plan, found, array.indexes["layer"].tolist())
    out = described(
        out, rows, "probe", _METHOD, what=what, at=rows.attrs.get("positions"),
        groups=plan.groups_name, confounds=list(confounds), folds=folds,
        n_permutations=n_permutations, n_features=n_features, seed=seed,
    )  # fmt: skip
    not_tested = "; ".join(f"layer {layer}: {error.what}" for layer, error in refused.items())
    return out.assign_attrs(_sentences(out, plan), not_tested=not_tested)


# --- one layer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """Results of one layer.

    Attributes
    ----------
    numbers
        Variables by layer.
    statistics
        ``(1 + permutations,)``, the observed one first.
    prediction
        ``(sample,)`` of all samples, NaN where left out.
    """

    numbers: dict[str, float]
    statistics: np.ndarray
    prediction: np.ndarray


def _probe_layer(array: xr.DataArray, plan: Plan, n_features: int) -> _Layer:
    x, used = read_rows(array, plan.kept)
    fold, target = plan.fold[used], plan.exchange.columns[used[plan.kept]]
    y = target[:, 0]
    require_groups(len(np.unique(plan.groups[used])), len(np.unique(plan.fold[plan.kept])),
                    plan.groups_name)  # fmt: skip
    require_values(plan.target, y, fold)
    rows = Rows(x, plan.confounds[used], plan.groups[used], n_features)
    statistics, alone, base, both = _predictions(plan, rows, target, fold)
    numbers = _scores(plan, y, fold, rows.groups, (alone, base, both))
    numbers["statistic"] = float(statistics[0])
    numbers["p"] = _p(statistics, statistics)
    prediction = np.full(len(used), np.nan)
    prediction[used] = alone
    return _Layer(numbers, statistics, prediction)


def _predictions(
    plan: Plan, rows: Rows, target: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the statistic by permutation, and predictions of layer, baseline, both together.

    The statistic is the share of the baseline's squared error that the layer removes.
    """
    nothing = out_of_fold(ridge, rows.without_x(), target, fold)
    full = out_of_fold(ridge, rows, target, fold)
    statistics = 1 - ((target - full) ** 2).sum(0) / ((target - nothing) ** 2).sum(0)
    y, alone, base, both = target[:, 0], full[:, 0], nothing[:, 0], full[:, 0]
    model = logistic if plan.target.classes else ridge
    if plan.target.classes or plan.confound_names:
        alone = both = out_of_fold(model, rows.without_confounds(), y, fold)
    if plan.confound_names:
        base, both = nothing[:, 0], full[:, 0]
        if plan.target.classes:
            base = out_of_fold(model, rows.without_x(), y, fold)
            both = out_of_fold(model, rows, y, fold)
    return np.asarray(statistics), alone, base, both


def _p(statistics: np.ndarray, extreme: np.ndarray) -> float:
    """Return the share of permutations, the observed order among them, that reach the first."""
    if len(extreme) < 2:
        return float("nan")
    return float((extreme >= statistics[0] - _TIE * max(1, abs(statistics[0]))).mean())


def _scores(
    plan: Plan,
    y: np.ndarray,
    fold: np.ndarray,
    groups: np.ndarray,
    predictions: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> dict[str, float]:
    """Score the probe, the baseline and both together, with intervals over groups."""
    numbers = np.unique(groups, return_inverse=True)[1]
    n_groups = int(numbers.max()) + 1

    def scores(weights: np.ndarray) -> np.ndarray:
        found = [plan.score(y, one, fold, weights) for one in predictions]
        return np.array([found[0], found[2] - found[1]])

    alone, base, both = (
        float(plan.score(y, one, fold, np.ones((1, len(y))))[0]) for one in predictions
    )
    drawn = resampled(scores, numbers, np.random.default_rng(plan.seed))
    n_folds = len(np.unique(fold))
    low, high = interval(alone, drawn[0], n_groups, n_folds)
    least, most = interval(both - base, drawn[1], n_groups, n_folds)
    found = {"score": alone, "low": low, "high": min(1.0, high)}
    if plan.target.classes:
        found["accuracy"] = float(((predictions[0] > 0.5) == (y == 1)).mean())
        found["low"] = max(0.0, low)
    found |= {"baseline": base}
    if plan.confound_names:
        found |= {"score_with_confounds": both, "improvement": both - base}
        found |= {"improvement_low": least, "improvement_high": most}
    else:
        found["improvement"] = both - base
    return found | {"n_samples": len(y), "n_groups": n_groups}


# --- result ------------------------------------------------------------------------------------


def _result(
    rows: xr.Dataset, plan: Plan, found: dict[int, _Layer], layers: list[int]
) -> xr.Dataset:
    names = list(next(iter(found.values())).numbers)
    largest = np.max([one.statistics for one in found.values()], axis=0)
    nothing = np.full(len(plan.kept), np.nan)
    variables: dict[Hashable, Any] = {
        name: ("layer", [found[n].numbers[name] if n in found else np.nan for n in layers])
        for name in names
    }
    variables["p_familywise"] = (
        "layer",
        [_p(found[n].statistics, largest) if n in found else np.nan for n in layers],
    )
    for name in ("n_samples", "n_groups"):
        counts = [found[n].numbers[name] if n in found else 0 for n in layers]
        variables[name] = ("layer", np.array(counts, np.int64))
    predictions = [found[n].prediction if n in found else nothing for n in layers]
    variables["prediction"] = (("layer", SAMPLE), np.array(predictions))
    variables["fold"] = (SAMPLE, plan.fold)
    variables["target"] = (SAMPLE, plan.target.values)
    coords = {name: rows[name].variable for name in ("scenario", "position") if name in rows.coords}
    return xr.Dataset(variables, {"layer": layers, **coords})


def _sentences(out: xr.Dataset, plan: Plan) -> dict[str, Any]:
    """Return the attributes that answer the question, and what they cannot say."""
    left_out = int((~plan.kept).sum())
    unit, smallest = plan.exchange.unit, plan.exchange.smallest_p
    n_groups = int(plan.groups.max()) + 1
    by_prompt = plan.groups_name in ("scenario", "scenario_name")
    limits = [
        f"{n_groups} groups ({plan.groups_name}"
        + (", so that prompts of one template are in all folds)" if by_prompt else ")")
        + "; the target is exchanged between "
        + ("groups" if unit == "groups" else "samples of one group: p is about differences there"),
        f"no p can be below {smallest:.2g}" if plan.n_permutations else "no p was asked for",
        f"{left_out} samples without target, group or confounds are left out" if left_out else "",
        "the interval is about probes trained on as many other groups",
    ]
    return {
        **described_values(plan.target, plan.exchange.columns[:, 0]),
        "score": "auc" if plan.target.classes else "r2",
        "findings": _findings(out, plan),
        "limits": "; ".join(filter(None, limits)) + ".",
        "null": "the layer says nothing about the target"
        + (" beyond " + ", ".join(plan.confound_names) if plan.confound_names else ""),
        "exchanged": unit,
        "smallest_p": smallest if plan.n_permutations else float("nan"),
    }


def _findings(out: xr.Dataset, plan: Plan) -> str:
    """Say in which layer the target is read best, and whether that is more than chance."""
    ranked = "improvement" if plan.confound_names else "score"
    best = out.isel(layer=int(np.nanargmax(out[ranked].to_numpy())))
    number = {name: float(one) for name, one in best.data_vars.items() if not one.dims}
    score = "AUC" if plan.target.classes else "R²"
    target, layer = plan.target.name, int(best["layer"])
    text = (
        f"{target} is predicted best from layer {layer}: {score} {number['score']:.2f} "
        f"[{number['low']:.2f}, {number['high']:.2f}] out of fold, {int(best['n_samples'])} samples"
        f" in {int(best['n_groups'])} groups"
    )
    if plan.confound_names:
        text += (
            f"; beyond {', '.join(plan.confound_names)} ({number['baseline']:.2f}) it adds "
            f"{number['improvement']:.2f} [{number['improvement_low']:.2f}, "
            f"{number['improvement_high']:.2f}]"
        )
    if not plan.n_permutations:
        return text + "."
    least = float(out["p_familywise"].min())
    reached = (out["p_familywise"] <= _SIGNIFICANT).to_numpy()
    which = f"{int(reached.sum())} of {out.sizes['layer']} layers"
    chance = "the confounds" if plan.confound_names else "chance"
    if not reached.any():
        no = f"no layer predicts it better than {chance} (smallest familywise p {least:.2g}"
        if plan.exchange.smallest_p > _SIGNIFICANT:
            no += f"; with these groups none can be below {plan.exchange.smallest_p:.2g}"
        no += ")"
        return f"{text}; {no}."
    return f"{text}; {which} predict it better than {chance} (familywise p ≤ {_SIGNIFICANT})."
