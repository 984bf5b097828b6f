"""Layouts hold for every size, and attribute values are frozen and exact."""

from __future__ import annotations

import itertools
import math
from typing import Any

import fakes
import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from zarrtrace.errors import ConfigError
from zarrtrace.format.attributes import (
    RunAttributes,
    SAEAttributes,
    TraceAttributes,
    is_trace,
    layers_in,
    ranges,
)
from zarrtrace.format.index_layout import IndexAttributes
from zarrtrace.format.layout import (
    NO_ID,
    PLAIN_COORDINATES,
    ROWS,
    ArrayLayout,
    Limits,
    TraceShape,
    attention_chunk_rows,
    attention_rows,
    feature_rows,
    residual_rows,
    trace_layout,
)
from zarrtrace.format.shared_saes import share_saes

FILE_BYTES = 512 * 2**20
#: Dimensions whose labels are positions alone.
RANKS = {"rank", "feature_rank"}


def layout_for(**sizes: Any) -> dict[str, ArrayLayout]:
    return trace_layout(fakes.make_shape(**sizes))


def dense_bytes(layout: ArrayLayout, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(layout.dtype).itemsize


# --- files and chunks --------------------------------------------------------------------------


@given(strategies.model_sizes)
def test_files_hold_whole_chunks_and_stay_within_512_mb(sizes: dict[str, Any]) -> None:
    for name, layout in layout_for(**sizes).items():
        assert len(layout.dims) == len(layout.shape) == len(layout.chunks)
        if layout.shards is None:
            continue
        assert all(s % c == 0 for s, c in zip(layout.shards, layout.chunks, strict=True)), name
        axis = layout.row_axis
        chunk_row = list(layout.shards)
        chunk_row[0], chunk_row[axis] = 1, layout.chunks[axis]
        # One row of chunks is never cut.
        most = max(FILE_BYTES, dense_bytes(layout, tuple(chunk_row)))
        assert dense_bytes(layout, layout.shards) <= most, name


@given(strategies.model_sizes, strategies.small_limits)
def test_files_hold_as_many_layers_as_fit_and_only_then_are_cut_by_rows(
    sizes: dict[str, Any], limits: Limits
) -> None:
    for name, layout in layout_for(**sizes, limits=limits).items():
        if not layout.has_layers:
            continue
        assert layout.shards is not None
        axis, layers = layout.row_axis, layout.shards[0]
        whole = [-(-s // c) * c for s, c in zip(layout.shape, layout.chunks, strict=True)]
        by_row = layout.shards[axis] < whole[axis]
        # Only rows and layers are cut: columns and heads of a row stay in one file.
        expected = [layers, *whole[1:]]
        expected[axis] = layout.shards[axis]
        assert [*layout.shards] == expected, name
        assert layers == 1 or not by_row
        if layers < layout.shape[0]:  # one layer more would be too much
            more = dense_bytes(layout, (layers + 1, *layout.shards[1:]))
            assert by_row or more > limits.file_bytes, name
        if by_row:
            more = dense_bytes(layout, layout.shards) // layout.shards[axis]
            assert more * (layout.shards[axis] + layout.chunks[axis]) > limits.file_bytes, name


@given(strategies.model_sizes)
def test_chunks_hold_one_layer_and_no_more_than_the_array_needs(sizes: dict[str, Any]) -> None:
    for name, layout in layout_for(**sizes).items():
        for size, chunk in zip(layout.shape, layout.chunks, strict=True):
            assert 1 <= chunk <= max(size, 1), name
        if layout.has_layers:
            assert layout.chunks[0] == 1


@given(strategies.model_sizes)
def test_key_rows_are_whole_up_to_1024_keys(sizes: dict[str, Any]) -> None:
    for name in ("attention", "attention_mean"):
        assert layout_for(**sizes)[name].chunks[-1] == min(sizes["tokens"], 1024)


@given(strategies.model_sizes, st.just(Limits()) | strategies.small_limits)
@example(
    {"layers": (1,), "tokens": 277, "heads": 8, "features": 131072, "attention_dtype": "float16"},
    Limits(),
)
def test_records_of_long_prompts_hold_whole_chunks_within_a_bound(
    sizes: dict[str, Any], limits: Limits
) -> None:
    tokens, heads, dtype = sizes["tokens"], sizes["heads"], sizes["attention_dtype"]
    attention = attention_rows(tokens, heads, dtype, limits)
    features = feature_rows(tokens, sizes["features"], limits)
    for name, layout in layout_for(**sizes, limits=limits).items():
        if not layout.has_layers:
            continue
        rows = attention if name.startswith("attention") else features
        if name == "residual":
            rows = residual_rows(tokens, sizes["channels"], limits)
        step = layout.chunks[layout.row_axis]
        assert rows == tokens or (0 < rows < tokens and rows % step == 0), name
        if name in ("attention", "features", "residual"):
            row = {
                "attention": dense_bytes(layout, (heads, tokens)),
                "features": sizes["features"] * 4,
                "residual": (sizes.get("channels") or 0) * 4,
            }[name]
            assert rows <= step or rows * row <= limits.record_bytes, name


@pytest.mark.parametrize("tokens", [1, 121, 277, 300])
def test_a_trace_is_at_most_40_files_in_22_folders(tokens: int) -> None:
    """With default options, a model of 31 layers, and up to 300 tokens."""
    shape = TraceShape(
        layers=31,
        tokens=tokens,
        heads=32,
        features={"features": 32768},
        attention_dtype="float32",
        feature_dtype="float32",
        sae_fields=("sae_id",),
    )
    layouts = trace_layout(shape)
    files = 1 + sum(1 + files_of(layout) for layout in layouts.values())
    assert files <= 40
    assert 1 + len(layouts) <= 22
    if tokens <= 121:  # each array is one file
        assert files == 1 + 2 * len(layouts)


def files_of(layout: ArrayLayout) -> int:
    step = layout.shards or layout.chunks
    return math.prod(-(-size // one) for size, one in zip(layout.shape, step, strict=True))


@pytest.mark.parametrize("tokens", [121, 277, 300])
def test_one_feature_and_one_token_decode_few_megabytes(tokens: int) -> None:
    layout = layout_for(layers=range(1, 32), heads=32, tokens=tokens, features=32768)["features"]
    chunk = dense_bytes(layout, layout.chunks)
    _, rows, columns = (-(-s // c) for s, c in zip(layout.shape, layout.chunks, strict=True))
    assert chunk * 31 * rows <= 165e6  # one feature, every token and layer
    assert chunk * 31 * columns <= 261e6  # one token, every feature and layer


# --- arrays ------------------------------------------------------------------------------------


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
    for dim in set(dims) - RANKS:
        assert layouts[dim].dims == (dim,)
        assert layouts[dim].dtype == "int64"


@given(strategies.trace_sizes)
def test_arrays_are_those_asked_for(sizes: dict[str, Any]) -> None:
    layouts = layout_for(**sizes)
    attention = {"attention", "attention_mean", "head"}
    features = {"features", "top_feature", "top_activation", "feature"}
    next_token = {"next_token", "next_token_logprob", "next_token_text"}
    tokens = {"layer", "query", "key", "token_id", "key_token", "special", "query_token"}
    expected = tokens | next_token
    expected |= attention if sizes["heads"] else set()
    expected |= features if sizes["features"] else set()
    expected |= {"residual", "channel"} if sizes["channels"] else set()
    assert set(layouts) == expected
    if sizes["heads"]:
        assert layouts["attention"].dtype == sizes["attention_dtype"]
        assert layouts["attention_mean"].dtype == "float32"
    if sizes["features"]:
        assert layouts["features"].dtype == sizes["feature_dtype"]
    if sizes["channels"]:
        assert layouts["residual"].dtype == sizes["residual_dtype"]


def test_layout_of_the_missions_model() -> None:
    layouts = layout_for(layers=range(1, 32), heads=32, tokens=121, features=32768)
    assert layouts["attention"].dims == ("layer", "head", "query", "key")
    assert layouts["attention"].shape == (31, 32, 121, 121)
    assert layouts["attention"].chunks == (1, 32, 32, 121)
    assert layouts["attention"].shards == (31, 32, 128, 121)
    assert layouts["features"].dims == ("layer", "query", "feature")
    assert layouts["features"].shape == (31, 121, 32768)
    assert layouts["features"].chunks == (1, 64, 4096)
    assert layouts["features"].shards == (31, 128, 32768)
    assert layouts["top_feature"].dims == ("layer", "query", "feature_rank")
    assert layouts["top_feature"].shape == (31, 121, 32)
    assert layouts["next_token"].dims == layouts["next_token_text"].dims == ("query", "rank")
    assert layouts["next_token"].shape == layouts["next_token_text"].shape == (121, 10)


def test_labels_of_tokens_are_along_key_which_is_always_there() -> None:
    for heads in (None, 2):
        layouts = layout_for(heads=heads)
        assert all(layouts[name].dims == ("key",) for name in ("token_id", "key_token", "special"))
        assert layouts["query_token"].dims == ("query",)
        assert layouts["key"].shape == (7,)
    assert "special" not in trace_layout(TraceShape(layers=1, tokens=3, special=False))


def test_chosen_rows_and_layers_of_attention_are_dimensions_of_their_own() -> None:
    layouts = trace_layout(
        TraceShape(layers=4, tokens=9, heads=2, attention_layers=3, attention_positions=2)
    )
    assert layouts["attention"].dims == ("attention_layer", "head", "attention_query", "key")
    assert layouts["attention"].shape == (3, 2, 2, 9)
    assert layouts["attention_mean"].dims == ("attention_layer", "attention_query", "key")
    assert layouts["attention_query"].shape == (2,)
    assert layouts["attention_layer"].shape == (3,)
    assert layouts["query"].shape == layouts["key"].shape == (9,)


def test_several_saes_have_arrays_and_dimensions_of_their_own() -> None:
    layouts = layout_for(features={"features": 16, "features_mlp": 64})
    assert layouts["features_mlp"].dims == ("layer", "query", "feature_mlp")
    assert layouts["top_feature_mlp"].shape == (3, 7, 32)
    assert layouts["feature_mlp"].shape == (64,)


def test_next_token_arrays_can_be_left_out() -> None:
    assert not {name for name in layout_for(next_token=False) if name.startswith("next_token")}


@pytest.mark.parametrize("tokens", [7, 300, 301, 2000])
def test_missing_numbers_read_as_nan_and_missing_ids_as_no_id(tokens: int) -> None:
    for name, layout in layout_for(tokens=tokens).items():
        if layout.dtype.startswith("float"):
            assert math.isnan(float(layout.fill_value)), name
        elif layout.dtype == "uint32" and name not in PLAIN_COORDINATES:
            assert layout.fill_value == NO_ID == 2**32 - 1, name


@pytest.mark.parametrize(
    ("channels", "rows"), [(64, 64), (768, 64), (2304, 64), (4096, 32), (8192, 16), (200_000, 1)]
)
def test_chunks_of_residual_hold_whole_channels_of_some_rows(channels: int, rows: int) -> None:
    layout = layout_for(tokens=300, channels=channels)["residual"]
    assert layout.dims == ("layer", "query", "channel")
    assert layout.chunks == (1, rows, channels)
    assert layout.shards is not None
    assert layout.shards[1:] == (-(-300 // rows) * rows, channels)
    assert dense_bytes(layout, layout.chunks) <= 640 * 2**10 or rows == 1


def test_chunks_of_attention_hold_fewer_rows_where_rows_are_large() -> None:
    found = [attention_chunk_rows(tokens, 32) for tokens in (1, 150, 300, 600, 1100, 10**6)]
    assert found == [32, 32, 16, 8, 4, 4]
    assert [attention_chunk_rows(277, heads) for heads in (8, 32, 128, 10**6)] == [32, 16, 4, 1]
    assert attention_chunk_rows(10**6, 32, Limits(queries=1)) == 1


def test_rows_are_along_one_dimension() -> None:
    for layout in layout_for().values():
        if layout.has_layers:
            assert sum(dim in ROWS for dim in layout.dims) == 1


# --- attributes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        fakes.make_trace_attributes(),
        fakes.make_trace_attributes().model,
        fakes.make_trace_attributes().spans["balance"],
        fakes.make_saes((1,), 4)[0],
        share_saes(fakes.make_saes((1,), 4), (1,))[0]["features"],
        RunAttributes(scenarios=("a",), config={}),
        IndexAttributes(layers=(1,), features={"features": 4}, scenarios=1, indexed=1),
        layout_for()["attention"],
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_frozen_and_refuse_unknown_fields(value: Any) -> None:
    field = next(iter(type(value).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, field, getattr(value, field))
    with pytest.raises(ValidationError, match="extra_forbidden"):
        type(value).model_validate({**value.model_dump(), "colour": "red"})


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("format_version", 1),
        ("format_version", 3),
        ("kind", "run"),
        ("layers", [-1]),
        ("layers", "1-"),
        ("layers", "-1"),
        ("layers", "1 2"),
        ("layers", "٣"),
        ("layers", "0-99999999999"),
        ("layers_without_sae", "x"),
        ("layers_without_attention", {"mamba": "2-x"}),
        ("attention_dtype", "bfloat16"),
        ("attention_keepbits", 24),
        ("nonfinite", {"attention": "1,,2"}),
        ("seal", "xyz"),
        ("saes", {"features": {"release": None}}),
    ],
)
def test_wrong_attributes_are_refused(field: str, wrong: Any) -> None:
    good = fakes.make_trace_attributes().model_dump(mode="json")
    assert TraceAttributes.model_validate(good)
    with pytest.raises(ValidationError, match=field):
        TraceAttributes.model_validate({**good, field: wrong})


@given(strategies.layers)
def test_attributes_are_equal_after_json(layers: tuple[int, ...]) -> None:
    attributes = fakes.make_trace_attributes(
        layers=layers,
        layers_without_sae=layers[:1],
        layers_without_attention={"mamba": layers[1:]},
        nonfinite={"attention": layers, "next_token_logprob": ()},
    )
    plain = attributes.model_dump(mode="json")
    assert plain["layers"] == ranges(layers)
    assert plain["nonfinite"] == {"attention": ranges(layers), "next_token_logprob": ""}
    assert TraceAttributes.model_validate(plain) == attributes
    assert is_trace(plain)
    assert attributes.layers_of("layer") == layers
    assert attributes.layers_of("attention_layer") == layers[:1]


def test_only_attributes_of_a_trace_are_taken_for_them() -> None:
    assert not is_trace(RunAttributes(scenarios=(), config={}).model_dump())
    assert not is_trace({"kind": "trace"})


@given(st.lists(st.integers(0, 60), unique=True))
def test_layers_are_the_same_as_text_and_back(layers: list[int]) -> None:
    """In whatever order they were asked for."""
    assert layers_in(ranges(layers)) == tuple(layers)


@given(st.sets(st.integers(0, 60)).map(sorted))
def test_ranges_are_as_few_as_can_be(layers: list[int]) -> None:
    parts = [list(map(int, part.split("-"))) for part in ranges(layers).split(",") if part]
    assert [*itertools.chain(*(range(p[0], p[-1] + 1) for p in parts))] == layers
    assert all(b[0] > a[-1] + 1 for a, b in itertools.pairwise(parts))


@given(st.text("0123456789-, x\n", max_size=8))
def test_text_that_is_no_list_of_layers_is_refused(text: str) -> None:
    try:
        found = layers_in(text)
    except ValueError:
        return
    # "3-1" names no layer; all else is what its numbers say.
    numbers = [part.partition("-") for part in text.split(",")] if text else []
    expected = [range(int(a), int(b or a) + 1) for a, _, b in numbers]
    assert found == tuple(itertools.chain(*expected))


# --- what layers share of their SAEs -----------------------------------------------------------


def sae(layer: int, **changes: Any) -> SAEAttributes:
    return fakes.make_saes((layer,), 16)[0].model_copy(update=changes)


def test_layers_share_what_is_equal_but_for_their_number() -> None:
    layers = (1, 11, 12)
    shared, by_layer = share_saes(fakes.make_saes(layers, 16), layers)
    assert shared["features"].hook_name == "blocks.{layer}.hook_resid_post"
    assert (shared["features"].d_in, shared["features"].d_sae) == (8, 16)
    assert by_layer == {"sae_id": ["l1", "l11", "l12"]}


@pytest.mark.parametrize("layers", [(32,), (31, 32)])
def test_numbers_that_name_no_layer_stay(layers: tuple[int, ...]) -> None:
    """The data type float32 in layer 32."""
    shared, by_layer = share_saes(fakes.make_saes(layers, 16), layers)
    assert shared["features"].dtype == "float32"
    assert shared["features"].hook_name == "blocks.{layer}.hook_resid_post"
    assert by_layer.keys() == {"sae_id"}


def test_fields_that_differ_are_stored_by_layer() -> None:
    saes = [sae(1, dtype="float32"), sae(3, dtype="bfloat16", hook_name="blocks.3.hook_mlp_out")]
    shared, by_layer = share_saes(saes, (1, 2, 3))
    assert shared["features"].dtype is None
    assert shared["features"].hook_name is None
    assert shared["features"].architecture == "jumprelu"
    assert by_layer == {
        "sae_id": ["l1", "", "l3"],
        "sae_dtype": ["float32", "", "bfloat16"],
        "sae_hook_name": ["blocks.1.hook_resid_post", "", "blocks.3.hook_mlp_out"],
    }


def test_arrays_share_apart() -> None:
    saes = [sae(1), sae(1, variable="features_mlp", id="mlp", d_sae=64)]
    shared, by_layer = share_saes(saes, (1,))
    assert {name: one.d_sae for name, one in shared.items()} == {
        "features": 16,
        "features_mlp": 64,
    }
    assert by_layer == {"sae_id": ["l1"], "sae_id_mlp": ["mlp"]}


@pytest.mark.parametrize(
    ("field", "value"),
    [("release", "other"), ("d_in", 9), ("d_sae", 17), ("decoder_norm_folded", True)],
)
def test_saes_of_one_array_must_be_of_one_kind(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"layers 1 and 2 differ in {field}"):
        share_saes([sae(1), sae(2, **{field: value})], (1, 2))


def test_nothing_is_shared_without_saes() -> None:
    assert share_saes((), (1, 2)) == ({}, {})
