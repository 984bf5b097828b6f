"""The layout holds for every size, and the format's values are frozen and exact."""

from __future__ import annotations

import itertools
import math
from typing import Any

import fakes
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zarrtrace import spec
from zarrtrace.format.attributes import RunAttributes, Stored, TraceAttributes
from zarrtrace.format.layout import ArrayLayout, trace_layout

GIB = 2**30


def layout_for(**sizes: Any) -> dict[str, ArrayLayout]:
    return trace_layout(fakes.make_shape(**sizes))


@given(strategies.model_sizes)
def test_shards_are_whole_chunks_below_the_bound(sizes: dict[str, Any]) -> None:
    for layout in layout_for(**sizes).values():
        assert len(layout.dims) == len(layout.shape) == len(layout.chunks)
        if layout.shards is None:
            continue
        assert all(s % c == 0 for s, c in zip(layout.shards, layout.chunks, strict=True))
        itemsize = np.dtype(layout.dtype).itemsize
        one_row_of_chunks = math.prod(layout.shards) // layout.shards[-2] * layout.chunks[-2]
        # A shard is below 0.5 GB, or cannot be cut further: one row of chunks.
        assert math.prod(layout.shards) * itemsize <= max(GIB // 2, one_row_of_chunks * itemsize)


@given(strategies.model_sizes)
def test_layers_never_share_a_file(sizes: dict[str, Any]) -> None:
    for layout in layout_for(**sizes).values():
        if layout.dims[0] == "layer" and len(layout.dims) > 1:
            assert (layout.shards or layout.chunks)[0] == layout.chunks[0] == 1


@given(strategies.model_sizes)
def test_no_chunk_is_larger_than_its_array_needs(sizes: dict[str, Any]) -> None:
    for name, layout in layout_for(**sizes).items():
        for size, chunk in zip(layout.shape, layout.chunks, strict=True):
            assert 1 <= chunk <= max(size, 1), name


@given(strategies.trace_sizes)
def test_every_dimension_has_one_size_and_an_index(sizes: dict[str, Any]) -> None:
    layouts = layout_for(**sizes)
    found = {
        (dim, size)
        for layout in layouts.values()
        for dim, size in zip(layout.dims, layout.shape, strict=True)
    }
    dims = [dim for dim, _ in found]
    assert len(dims) == len(set(dims))
    # Ranks are plain positions; every other dimension has labels.
    for dim in set(dims) - {"rank", "feature_rank"}:
        assert layouts[dim].dims == (dim,)
        assert layouts[dim].dtype == "int64"


@given(strategies.trace_sizes)
def test_arrays_are_those_asked_for(sizes: dict[str, Any]) -> None:
    layouts = layout_for(**sizes)
    attention = {"attention", "attention_mean", "head", "key", "key_token"}
    features = {"features", "top_feature", "top_activation", "feature"}
    assert attention <= set(layouts) if sizes["heads"] else not attention & set(layouts)
    assert features <= set(layouts) if sizes["features"] else not features & set(layouts)
    assert {"layer", "query", "query_token", "token_id", "next_token"} <= set(layouts)
    if sizes["heads"]:
        assert layouts["attention"].dtype == sizes["attention_dtype"]
        assert layouts["attention_mean"].dtype == "float32"
    if sizes["features"]:
        assert layouts["features"].dtype == sizes["feature_dtype"]


def test_layout_of_the_missions_model() -> None:
    layouts = layout_for(layers=range(1, 32), heads=32, tokens=121, features=32768)
    assert layouts["attention"].dims == ("layer", "head", "query", "key")
    assert layouts["attention"].shape == (31, 32, 121, 121)
    assert layouts["features"].dims == ("layer", "query", "feature")
    assert layouts["features"].shape == (31, 121, 32768)
    assert layouts["features"].chunks == (1, 64, 4096)
    assert layouts["features"].shards == (1, 128, 32768)
    assert layouts["top_feature"].dims == ("layer", "query", "feature_rank")
    assert layouts["top_feature"].shape == (31, 121, 32)
    assert layouts["next_token"].dims == ("query", "rank")
    assert layouts["next_token"].shape == (121, 10)


def test_several_saes_have_arrays_and_dimensions_of_their_own() -> None:
    layouts = layout_for(features={"features": 16, "features_mlp": 64})
    assert layouts["features_mlp"].dims == ("layer", "query", "feature_mlp")
    assert layouts["top_feature_mlp"].shape == (3, 7, 32)
    assert layouts["feature_mlp"].shape == (64,)


def test_next_token_arrays_can_be_left_out() -> None:
    layouts = layout_for(next_token=False)
    assert not {"next_token", "next_token_logprob"} & set(layouts)


def test_what_is_not_stored_reads_as_nan() -> None:
    for name, layout in layout_for().items():
        if layout.dtype.startswith("float"):
            assert math.isnan(float(layout.fill_value)), name


@pytest.mark.parametrize(
    "value",
    [
        fakes.make_trace_attributes(),
        fakes.make_trace_attributes().model,
        fakes.make_trace_attributes().saes[0],
        Stored(bytes=1, blake2b="0" * 16),
        RunAttributes(scenarios=("a",), config={}),
        layout_for()["attention"],
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_frozen_and_refuse_what_they_do_not_know(value: Any) -> None:
    field = next(iter(type(value).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, field, getattr(value, field))
    with pytest.raises(ValidationError, match="extra_forbidden"):
        type(value).model_validate({**value.model_dump(), "colour": "red"})


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("format_version", 2),
        ("kind", "run"),
        ("layers", [-1]),
        ("attention_dtype", "bfloat16"),
        ("stored", {"1": {"attention": {"bytes": -1, "blake2b": "0" * 16}}}),
        ("stored", {"1": {"attention": {"bytes": 1, "blake2b": "xyz"}}}),
    ],
)
def test_wrong_attributes_are_refused(field: str, wrong: Any) -> None:
    good = fakes.make_trace_attributes().model_dump(mode="json")
    assert TraceAttributes.model_validate(good)
    with pytest.raises(ValidationError, match=field):
        TraceAttributes.model_validate({**good, field: wrong})


def test_journal_tells_which_layers_are_there() -> None:
    entry = {"attention": Stored(bytes=1, blake2b="0" * 16)}
    attributes = fakes.make_trace_attributes().model_copy(update={"stored": {"2": entry}})
    assert attributes.complete_layers == (2,)
    assert attributes.missing_layers == (1, 3)


@given(st.sets(st.integers(0, 60)).map(sorted))
def test_ranges_names_exactly_the_layers(layers: list[int]) -> None:
    parts = [list(map(int, part.split("-"))) for part in spec.ranges(layers).split(",") if part]
    assert [*itertools.chain(*(range(p[0], p[-1] + 1) for p in parts))] == layers
    # Neighbouring parts are apart, or they would be one.
    assert all(b[0] > a[-1] + 1 for a, b in itertools.pairwise(parts))
