"""Small tables with known values, and the records that they are written from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.format.layout import Limits
from zarrtrace.format.table_layout import TableAttributes, TableShape, table_columns
from zarrtrace.records import Nonzeros, SampleRecord, SampleTokens, TablePlan
from zarrtrace.store import TableWriter

#: Blocks of 16 samples, chunks of few numbers, files of few chunks.
SMALL = Limits(samples=16, attention=64, labels=24, file_bytes=2**13)


def nonzeros(dense: np.ndarray, columns: int) -> Nonzeros:
    """Take apart dense rows, block of columns by block of columns."""
    at, values = [], []
    for first in range(0, dense.shape[1], columns):
        part = dense[:, first : first + columns]
        row, column = np.nonzero(part)
        at.append(row * columns + column)
        values.append(part[row, column])
    return Nonzeros(dense.shape, columns, tuple(at), tuple(values))


@dataclass(frozen=True)
class Values:
    """Dense arrays of a table."""

    features: np.ndarray
    residual: np.ndarray
    next_token: np.ndarray
    next_token_logprob: np.ndarray
    next_token_text: np.ndarray


def values_of(layers: int, samples: int, features: int, channels: int, seed: int = 0) -> Values:
    """Make random values, of which one feature in ten fires."""
    rng = np.random.default_rng(seed)
    fires = rng.random((layers, samples, features)) < 0.1
    activations = (fires * rng.exponential(2, fires.shape)).astype(np.float32)
    ids = rng.integers(0, 1000, (samples, 10), dtype=np.uint32)
    return Values(
        features=activations,
        residual=rng.standard_normal((layers, samples, channels)).astype(np.float32),
        next_token=ids,
        next_token_logprob=-np.sort(rng.random((samples, 10))).astype(np.float32),
        next_token_text=np.array([[f" t{one}ü" for one in row] for row in ids], object),
    )


def coordinates_of(samples: int) -> dict[str, Any]:
    """Make coordinates of every type."""
    number = np.arange(samples)
    return {
        "scenario": [f"s{n // 2}" for n in number],
        "position": number % 7,
        "token": [f" token{n}" for n in number],
        "token_id": number.astype(np.uint32),
        "span": np.array(["decision", ""])[number % 2],
        "tags": ["safe,low"] * samples,
        "option_stop": np.where(number % 3, 17, -1),
        "balance": np.where(number % 5, number / 8, np.nan),
        "round": number * 10,
        "is_last": number % 2 == 0,
        "_paradigm": [f"p{n % 3}" for n in number],
    }


def plan_of(
    samples: int = 50,
    *,
    layers: tuple[int, ...] = (1, 2, 5),
    features: int = 300,
    channels: int = 12,
    config: dict[str, Any] | None = None,
    limits: Limits = SMALL,
    **changes: Any,
) -> TablePlan:
    """Return the plan of a table; layer 5 has no SAE."""
    attributes = TableAttributes(
        scenarios=(samples + 1) // 2,
        positions="last",
        spans=("decision",),
        options=("stop",),
        metadata=("balance", "round", "is_last", "_paradigm"),
        model=None,
        layers=layers,
        layers_without_sae=(5,) if 5 in layers else (),
        feature_dtype="float32",
        residual_dtype="float32",
        versions={"zarrtrace": "1", "torch": "2.4.0"},
    )
    saes = tuple(
        SAEAttributes(
            layer=layer, release="r", id=f"l{layer}", hook_name=f"blocks.{layer}.hook_resid_post",
            architecture="jumprelu", d_in=channels, d_sae=features, dtype="float32",
            decoder_norm_folded=False,
        )
        for layer in layers
        if layer != 5
    )  # fmt: skip
    shape = TableShape(
        layers=len(layers),
        samples=samples,
        features={"features": features},
        channels=channels,
        feature_dtype="float32",
        residual_dtype="float32",
        limits=limits,
    )
    asked = {"model": "m", "prompts": "abc", "versions": {"torch": "2.4.0"}}
    plan = TablePlan(
        attributes=attributes,
        shape=shape,
        coordinates=coordinates_of(samples),
        config=asked if config is None else config,
        saes=saes,
    )
    return replace(plan, **changes)


def records_of(
    plan: TablePlan, values: Values, *, start: int = 0, stop: int | None = None, step: int = 7
) -> Iterator[SampleRecord | SampleTokens]:
    """Yield the records of some samples, `step` samples at a time, layer by layer."""
    columns = table_columns(values.features.shape[2], plan.shape.limits)
    stop = plan.shape.samples if stop is None else stop
    for first in range(start, stop, step):
        rows = slice(first, min(first + step, stop))
        yield SampleTokens(
            first,
            values.next_token[rows],
            values.next_token_logprob[rows],
            values.next_token_text[rows],
        )
        for number, layer in enumerate(plan.attributes.layers):
            has_sae = layer not in plan.attributes.layers_without_sae
            found = {"features": nonzeros(values.features[number, rows], columns)}
            residual = values.residual[number, rows]
            yield SampleRecord(layer, first, found if has_sae else {}, residual)


def expected(plan: TablePlan, values: Values) -> Values:
    """Return what a reader must find: NaN in layers without SAE."""
    features = values.features.copy()
    for number, layer in enumerate(plan.attributes.layers):
        if layer in plan.attributes.layers_without_sae:
            features[number] = np.nan
    return replace(values, features=features)


def write_table(path: Any, plan: TablePlan, values: Values, *, step: int = 7, **how: Any) -> None:
    """Write a whole table, from where an earlier writer stopped."""
    with TableWriter(path, plan, **how) as writer:
        for record in records_of(plan, values, start=writer.done, step=step):
            writer.append(record)
        writer.finish()


def write_table_of_two_saes(path: Path, values: Values) -> None:
    """Write `features` with an SAE on layer 1 alone, and `features_mlp` with one on layer 2."""
    plan = plan_of(len(values.next_token))
    one, two = plan.saes
    size = values.features.shape[2]
    plan = replace(
        plan,
        saes=(one, two.model_copy(update={"variable": "features_mlp"})),
        shape=replace(plan.shape, features={"features": size, "features_mlp": size}),
    )
    with TableWriter(path, plan) as writer:
        for record in records_of(plan, values):
            is_second = isinstance(record, SampleRecord) and record.layer == 2
            writer.append(_of_second_sae(record) if is_second else record)
        writer.finish()


def _of_second_sae(record: Any) -> Any:
    return replace(record, features={"features_mlp": record.features["features"]})


def files_of(folder: Path) -> dict[str, bytes]:
    """Read every file of a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
