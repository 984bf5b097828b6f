"""Records in the precision in which a trace stores them.

Finite values must stay finite: ``nonfinite`` of what :func:`cast_record` returns is about the
stored values, not the computed ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numcodecs import BitRound

from zarrtrace.errors import NonFiniteError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.records import (
    BFloat16,
    FeatureRecord,
    LayerRecord,
    Nonzeros,
    SampleRecord,
    SampleTokens,
    TokensRecord,
)


def cast_record(
    record: LayerRecord | TokensRecord, attributes: TraceAttributes
) -> LayerRecord | TokensRecord:
    """Cast and round a record's arrays as a trace stores them.

    Activations too small for the stored precision become its smallest number, with their sign: a
    feature that fires is not stored as 0. Attention and residual too small for it become 0.

    Parameters
    ----------
    record
        A layer, or rows of it; next tokens are stored as they are.
    attributes
        The trace's, which name the precisions.

    Returns
    -------
    LayerRecord or TokensRecord
        Values too large for the precision are infinite, and its ``nonfinite`` names their arrays.
    """
    if isinstance(record, TokensRecord):
        return record
    attention, dtype = record.attention, attributes.attention_dtype
    if attention is not None and dtype == "float16":
        attention = _halves(attention)
    if attention is not None and attributes.attention_keepbits is not None:
        attention = _rounded(np.asarray(attention), attributes.attention_keepbits)
    residual = record.residual
    if residual is not None and attributes.residual_dtype == "float16":
        residual = _halves(residual)
    features = record.features
    if attributes.feature_dtype is not None:
        kind = np.dtype(attributes.feature_dtype)
        features = {name: _cast(one, kind) for name, one in features.items()}
    return replace(record, attention=attention, features=features, residual=residual)


def _halves(values: np.ndarray | BFloat16) -> np.ndarray:
    """Cast to float16; values too large for it become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16, copy=False)


def _rounded(values: np.ndarray, keepbits: int) -> np.ndarray:
    """Round to some bits of the mantissa; zeros behind them compress well."""
    rounded: np.ndarray = BitRound(keepbits).encode(values).view(values.dtype)
    # BitRound makes -0 of the NaN of GPUs, whose bits are all 1, and infinity of the largest.
    odd = ~(np.isfinite(values) & np.isfinite(rounded))
    if odd.any():
        rounded = np.where(odd, values, rounded)
    return rounded


def _cast(record: FeatureRecord, dtype: np.dtype) -> FeatureRecord:
    """Cast activations; the record notes whether any become infinite."""
    found = record.activations
    parts = found.values if isinstance(found, Nonzeros) else (found,)
    if all(part.dtype == dtype for part in parts):
        return record
    cast = tuple(_narrowed(part, dtype) for part in parts)
    finite = all(np.isfinite(part).all() for part in cast)
    activations = replace(found, values=cast) if isinstance(found, Nonzeros) else cast[0]
    return replace(record, activations=activations, nonfinite=record.nonfinite or not finite)


def _narrowed(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return keep_firing(values.astype(dtype), values)


def keep_firing(cast: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Replace the zeros that a cast made of activations by the type's smallest number, in place."""
    if cast.dtype == values.dtype:
        return cast
    lost = (cast == 0) & (values != 0)
    if lost.any():
        cast[lost] = np.copysign(np.finfo(cast.dtype).smallest_subnormal, values[lost])
    return cast


def cast_samples(
    record: SampleRecord | SampleTokens, attributes: TableAttributes
) -> SampleRecord | SampleTokens:
    """Cast a record's arrays as a table stores them; see :func:`cast_record`.

    Raises
    ------
    NonFiniteError
        If stored values would not be finite.
    """
    if isinstance(record, SampleTokens):
        if not np.isfinite(record.next_token_logprob).all():
            raise _not_finite(f"samples {record.start} and following: next_token_logprob")
        return record
    features, residual = dict(record.features), record.residual
    if attributes.feature_dtype is not None:
        dtype = np.dtype(attributes.feature_dtype)
        for name, found in features.items():
            if any(part.dtype != dtype for part in found.values):
                cast = tuple(_narrowed(part, dtype) for part in found.values)
                features[name] = replace(found, values=cast)
    if residual is not None and attributes.residual_dtype == "float16":
        residual = _halves(residual)
    stored = replace(record, features=features, residual=residual)
    for name in (*features, "residual"):
        if not _is_finite(stored, name):
            what = f"samples {record.start} and following: {name} of layer {record.layer}"
            if _is_finite(record, name):
                raise _too_large(what, name, attributes)
            raise _not_finite(what)
    return stored


def _not_finite(what: str) -> NonFiniteError:
    return NonFiniteError(
        f"{what} has NaN or infinity",
        why="The model overflowed: float16 ends at 65,504. Damaged weights do this, too.",
        remedy="Use --dtype bfloat16 or float32.",
    )


def _is_finite(record: SampleRecord, name: str) -> bool:
    """Whether all values of an array are finite."""
    if name in record.features:
        return all(np.isfinite(part).all() for part in record.features[name].values)
    return record.residual is None or bool(np.isfinite(np.asarray(record.residual)).all())


def refusal(
    record: LayerRecord | TokensRecord,
    stored: LayerRecord | TokensRecord,
    attributes: TraceAttributes,
) -> NonFiniteError:
    """Return the error that says why stored values are not finite.

    Parameters
    ----------
    record
        As the model computed it.
    stored
        Result of :func:`cast_record`.
    attributes
        The trace's.
    """
    names = ", ".join(stored.nonfinite)
    model, where = attributes.model, "the last layer"
    if isinstance(record, LayerRecord):
        where = f"layer {record.layer}"
        cast = [name for name in stored.nonfinite if not _is_computed(record, name)]
        if cast:
            return _too_large(f"{record.scenario}: {cast[0]} of {where}", cast[0], attributes)
    return NonFiniteError(
        f"{record.scenario}: the model computed NaN or infinity in {where} ({names})",
        why=f"The model runs in {model.dtype if model else 'an unknown precision'}; float16 ends "
        "at 65,504, which some models exceed. Damaged weights do this, too.",
        remedy="Use --dtype bfloat16 or float32, or store such values with --allow-nonfinite.",
    )


def _is_computed(record: LayerRecord, name: str) -> bool:
    """Whether the model computed NaN or infinity, rather than the cast."""
    if name in record.features:
        return record.features[name].nonfinite
    if name == "residual":
        return not np.isfinite(np.asarray(record.residual)).all()
    # The mean over heads is taken before attention is cast.
    return record.attention_mean is not None and not np.isfinite(record.attention_mean).all()


def _too_large(
    what: str, name: str, attributes: TraceAttributes | TableAttributes
) -> NonFiniteError:
    dtype, option = attributes.feature_dtype, "--feature-dtype"
    if name == "attention" and isinstance(attributes, TraceAttributes):
        dtype, option = attributes.attention_dtype, "--attention-dtype"
    elif name == "residual":
        dtype, option = attributes.residual_dtype, "--residual-dtype"
    return NonFiniteError(
        f"{what} has values that are infinite in {dtype}",
        why="The largest number of float16 is 65,504; the values are finite in float32.",
        remedy=f"Use {option} float32 (with --overwrite if the run exists), or store infinity "
        "with --allow-nonfinite.",
    )
