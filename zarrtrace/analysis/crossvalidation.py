"""Linear probes that never see the samples they are scored on.

Only :func:`out_of_fold` has all samples; a model gets the training samples with their targets, and
the held-out ones without. Whatever it chooses (features, scales, penalty), it chooses from those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import linalg, sparse

from zarrtrace.errors import ConfigError, install_command

#: Ridge penalties, of which the training samples choose one: as parts of ``max(n, columns)``, about
#: the mean eigenvalue of the standardised samples' Gram matrix that is non-zero.
PENALTIES = 10.0 ** np.arange(-4, 3)
# Folds among the training samples, to choose the penalty.
_INNER_FOLDS = 3
# A standard deviation below this part of what it was before confounds is rounding.
_ROUNDING = 1e-6
# Confounds have this standard deviation beside columns of 1: a penalty of 1/900 of theirs.
_CONFOUND_SCALE = 30.0


class Rows(NamedTuple):
    """Samples without their targets.

    Attributes
    ----------
    x
        ``(n, columns)`` dense, or sparse for SAE features.
    confounds
        ``(n, q)``.
    groups
        ``(n,)`` numbers of groups.
    n_columns
        Sparse columns that a model takes at most: those most often non-zero.
    """

    x: np.ndarray | sparse.csr_array
    confounds: np.ndarray
    groups: np.ndarray
    n_columns: int

    def take(self, chosen: np.ndarray) -> Rows:
        """Return some of the samples, by mask."""
        return self._replace(
            x=self.x[np.flatnonzero(chosen)],
            confounds=self.confounds[chosen],
            groups=self.groups[chosen],
        )

    def without_x(self) -> Rows:
        """Return the samples with their confounds alone."""
        return self._replace(x=np.empty((len(self.groups), 0)))

    def without_confounds(self) -> Rows:
        """Return the samples with their columns alone."""
        return self._replace(confounds=self.confounds[:, :0])


#: Takes training samples, their targets ``(n[, targets])`` and other samples; predicts these.
Model = Callable[[Rows, np.ndarray, Rows], np.ndarray]


def require_sklearn() -> None:
    """Refuse to go further without scikit-learn.

    Raises
    ------
    ConfigError
    """
    try:
        import sklearn  # noqa: F401, PLC0415 -- an extra
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a probe needs {error.name}, which is not installed",
            why="No other analysis needs scikit-learn, so it is an extra.",
            remedy=install_command("probe"),
        ) from None


def group_folds(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each sample; samples of a group are in one fold.

    Parameters
    ----------
    groups
        ``(n,)`` numbers of groups, at least `folds` different ones.
    folds
        Number of folds.
    seed
        Seed of the groups' order.
    """
    from sklearn.model_selection import GroupKFold  # noqa: PLC0415 -- an extra

    out = np.empty(len(groups), np.int64)
    splitter = GroupKFold(folds, shuffle=True, random_state=seed)
    for number, (_, test) in enumerate(splitter.split(groups, groups=groups)):
        out[test] = number
    return out


def out_of_fold(model: Model, rows: Rows, target: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Predict each sample by a model of the samples in the other folds.

    Parameters
    ----------
    model
        Gets the target of the training samples only.
    rows
        All samples.
    target
        ``(n,)`` or ``(n, targets)``.
    fold
        ``(n,)``.

    Returns
    -------
    np.ndarray
        Like `target`.
    """
    out = np.empty(target.shape)
    for number in np.unique(fold):
        test = fold == number
        out[test] = model(rows.take(~test), target[~test], rows.take(test))
    return out


def _inner_folds(groups: np.ndarray) -> Iterator[np.ndarray]:
    """Yield masks of held-out samples among training samples; none with one group."""
    n_groups = len(np.unique(groups))
    if n_groups > 1:
        fold = group_folds(groups, min(_INNER_FOLDS, n_groups), 0)
        yield from (fold == number for number in np.unique(fold))


# --- preparation -------------------------------------------------------------------------------


class ColumnScaling(NamedTuple):
    """Scaling of columns, learned from training samples.

    Attributes
    ----------
    columns
        Numbers of the columns that are used; None: all.
    nuisance
        ``(1 + q, columns)`` least squares of the columns by 1 and the confounds.
    scale
        ``(columns,)`` standard deviation of what is left; infinite where nothing is.
    """

    columns: np.ndarray | None
    nuisance: np.ndarray
    scale: np.ndarray

    def apply(self, rows: Rows) -> np.ndarray:
        """Return samples ``(n, columns)`` without their confounds, in standard deviations."""
        rest = _dense(rows.x, self.columns) - design(rows) @ self.nuisance
        return np.asarray(rest / self.scale)


def prepare(rows: Rows) -> tuple[ColumnScaling, np.ndarray]:
    """Choose columns and scales from training samples, and apply them to these."""
    columns = None
    if sparse.issparse(rows.x):
        from sklearn.feature_selection import SelectKBest  # noqa: PLC0415 -- an extra

        chooser = SelectKBest(_times_active, k=min(rows.n_columns, rows.x.shape[1]))
        columns = chooser.fit(rows.x, rows.groups).get_support(indices=True)
    x = _dense(rows.x, columns)
    known = design(rows)
    nuisance = linalg.lstsq(known, x)[0] if x.shape[1] else np.empty((known.shape[1], 0))
    rest = x - known @ nuisance
    scale = np.sqrt((rest**2).mean(0))
    scale[scale <= _ROUNDING * np.maximum(x.std(0), _ROUNDING * np.abs(x).max(0))] = np.inf
    return ColumnScaling(columns, nuisance, scale), rest / scale


def _times_active(x: sparse.csr_array, _groups: np.ndarray) -> np.ndarray:
    """Count the samples in which each column is non-zero, whatever the target."""
    return np.asarray((x != 0).sum(0)).ravel()


def _dense(x: Any, columns: np.ndarray | None) -> np.ndarray:
    chosen = x if columns is None else x[:, columns].toarray()
    return np.asarray(chosen, np.float64)


def design(rows: Rows) -> np.ndarray:
    """Return what is not penalised: 1 and the confounds."""
    return np.column_stack([np.ones(len(rows.groups)), rows.confounds])


# --- ridge -------------------------------------------------------------------------------------


class RidgeSystem:
    """Ridge regressions of many targets on the same prepared samples (Hoerl & Kennard 1970).

    Parameters
    ----------
    x
        ``(n, d)``, centred.
    y
        ``(n, targets)``, centred.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._by_samples = len(x) < x.shape[1]  # the smaller of two equal systems
        self._x = x
        self._gram = x @ x.T if self._by_samples else x.T @ x
        self._right = y if self._by_samples else x.T @ y
        self._unit = max(x.shape)

    def weights(self, penalty: float, targets: Any = slice(None)) -> np.ndarray:
        """Return weights ``(d, targets)``; `penalty` is a part of ``max(n, d)``."""
        solved = self._solved(penalty, targets)
        return np.asarray(self._x.T @ solved) if self._by_samples else solved

    def predictor(self, x: np.ndarray) -> Callable[[float, Any], np.ndarray]:
        """Return a function of penalty and targets that predicts other samples."""
        basis = x @ self._x.T if self._by_samples else x
        return lambda penalty, targets: basis @ self._solved(penalty, targets)

    def _solved(self, penalty: float, targets: Any) -> np.ndarray:
        system = self._gram.copy()
        system.flat[:: len(system) + 1] += penalty * self._unit
        factor = linalg.cho_factor(system, overwrite_a=True, check_finite=False)
        return np.asarray(linalg.cho_solve(factor, self._right[:, targets], check_finite=False))


def _fit_ridge(rows: Rows, y: np.ndarray) -> tuple[ColumnScaling, np.ndarray, RidgeSystem]:
    """Return the preparation, the targets' own nuisance weights and the system."""
    prepared, x = prepare(rows)
    known = design(rows)
    nuisance = linalg.lstsq(known, y)[0]
    return prepared, nuisance, RidgeSystem(x, y - known @ nuisance)


def choose_penalties(rows: Rows, y: np.ndarray) -> np.ndarray:
    """Return each target's best of :data:`PENALTIES` in folds of groups ``(targets,)``."""
    losses = np.zeros((len(PENALTIES), y.shape[1]))
    for test in _inner_folds(rows.groups):
        training, held_out = rows.take(~test), rows.take(test)
        prepared, nuisance, system = _fit_ridge(training, y[~test])
        missing = y[test] - design(held_out) @ nuisance
        predict = system.predictor(prepared.apply(held_out))
        for number, penalty in enumerate(PENALTIES):
            losses[number] += ((missing - predict(penalty, slice(None))) ** 2).sum(0)
    # The largest of equal ones.
    return np.asarray(PENALTIES[::-1][np.argmin(losses[::-1], axis=0)])


def ridge(training: Rows, y: np.ndarray, others: Rows) -> np.ndarray:
    """Predict numbers by ridge regression; 1 and the confounds are not penalised."""
    single = y.ndim == 1
    y = y[:, None] if single else y
    prepared, nuisance, system = _fit_ridge(training, y)
    out = np.asarray(design(others) @ nuisance)
    if len(prepared.scale):
        predict = system.predictor(prepared.apply(others))
        chosen = choose_penalties(training, y)
        for penalty in np.unique(chosen):
            targets = np.flatnonzero(chosen == penalty)
            out[:, targets] += predict(penalty, targets)
    return np.asarray(out[:, 0]) if single else out


def ridge_weights(rows: Rows, y: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return weights ``(columns,)`` in the columns' own units, the intercept and the penalty.

    The rows have no confounds.
    """
    prepared, nuisance, system = _fit_ridge(rows, y[:, None])
    penalty = float(choose_penalties(rows, y[:, None])[0])
    own = system.weights(penalty)[:, 0] / prepared.scale
    intercept = float(nuisance[0, 0] - prepared.nuisance[0] @ own)
    if prepared.columns is None:
        return own, intercept, penalty
    weights = np.zeros(rows.x.shape[1])
    weights[prepared.columns] = own
    return weights, intercept, penalty


# --- logistic regression -----------------------------------------------------------------------


def logistic(training: Rows, y: np.ndarray, others: Rows) -> np.ndarray:
    """Predict the probability of 1 by logistic regression with a ridge penalty.

    The penalty is the one that ridge regression on 0 and 1 chooses, by the variance of the target:
    a step of Newton's method from no weights is that ridge regression. Its choice in folds takes no
    iterations. Confounds are penalised 900 times less than the other columns.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 -- an extra
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    prepared, x = prepare(training)
    penalty = PENALTIES[0]
    if x.shape[1]:
        penalty = choose_penalties(training, y[:, None])[0]
    unit = max(x.shape)
    held_out = prepared.apply(others)
    if training.confounds.shape[1]:
        scaler = StandardScaler().fit(training.confounds)
        x = np.hstack([x, _CONFOUND_SCALE * scaler.transform(training.confounds)])
        held_out = np.hstack([held_out, _CONFOUND_SCALE * scaler.transform(others.confounds)])
    if x.shape[1] > len(x):
        # Weights lie in the span of the training samples: the same model with fewer columns.
        span = linalg.svd(x, full_matrices=False)[2].T
        x, held_out = x @ span, held_out @ span
    model = LogisticRegression(C=1 / (penalty * unit * y.var()), max_iter=5000)
    return np.asarray(model.fit(x, y).predict_proba(held_out)[:, 1])
