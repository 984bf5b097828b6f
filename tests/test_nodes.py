"""Metadata that is written here is what Zarr writes, and journals are what JSON says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec
from zarrtrace.store.attributes import canonical, read_group, seal_broken, sealed
from zarrtrace.store.nodes import (
    array_metadata,
    create_arrays,
    replace_journal,
)
from zarrtrace.store.shards import write_block

from zarrtrace.format.layout import (
    ATTENTION_BLOCK,
    ATTENTION_LEVEL,
    FEATURES_LEVEL,
    FEATURES_LEVEL_BY_TOKEN,
    FEATURES_ORDER,
    ArrayLayout,
    TraceShape,
    index_layout,
    trace_layout,
)

LAYOUTS = {
    **trace_layout(
        TraceShape(
            layers=3,
            tokens=300,
            heads=4,
            features={"features": 9000, "features_mlp_out": 24},
            attention_dtype="float16",
            attention_layers=2,
        )
    ),
    **trace_layout(
        TraceShape(layers=2, tokens=5, heads=2, features={}, chosen_queries=True, next_token=False)
    ),
    "features_by_token": trace_layout(
        TraceShape(layers=2, tokens=5, features={"features": 24}, feature_dtype="float32")
    )["features"].model_copy(update={"codec": "sparse_by_token"}),
    **{f"of_index_{name}": one for name, one in index_layout(2, {"features": 3000}, 7).items()},
}


def made_by_zarr(folder: Path, layout: ArrayLayout) -> dict[str, Any]:
    text = layout.dtype == "string"
    blosc = BloscCodec(
        cname="zstd", clevel=ATTENTION_LEVEL, shuffle="shuffle", blocksize=ATTENTION_BLOCK
    )
    compressors = {
        "attention": [blosc, Crc32cCodec()],
        "sparse": [ZstdCodec(level=FEATURES_LEVEL, checksum=False), Crc32cCodec()],
        "sparse_by_token": [
            ZstdCodec(level=FEATURES_LEVEL_BY_TOKEN, checksum=False),
            Crc32cCodec(),
        ],
        "plain": [ZstdCodec(level=1, checksum=True)],
    }
    zarr.create_array(
        folder,
        shape=layout.shape,
        dtype=str if text else layout.dtype,
        chunks=layout.chunks,
        shards=layout.shards,
        dimension_names=layout.dims,
        fill_value=layout.fill_value,
        attributes=dict(layout.attributes),
        serializer="auto" if text else BytesCodec(endian="little"),
        filters=[TransposeCodec(order=FEATURES_ORDER)] if layout.codec == "sparse" else None,
        compressors=compressors[layout.codec],
    )
    found: dict[str, Any] = json.loads((folder / "zarr.json").read_bytes())
    return found


def plain(node: Any) -> Any:
    """Leave out what generations of Zarr write or leave out, and means nothing."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if value not in ({}, [])}
    return [plain(value) for value in node] if isinstance(node, list) else node


@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_are_what_zarr_creates(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    assert plain(array_metadata(layout)) == plain(made_by_zarr(tmp_path / "zarr", layout))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=9))
def test_texts_are_what_zarr_reads(texts: list[str]) -> None:
    layout = ArrayLayout(
        dims=("scenario",), dtype="string", shape=(len(texts),), chunks=(4,), fill_value=""
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        create_arrays(path, {}, {"text": layout})
        write_block(path / "text", layout, (0,), np.asarray(texts, dtype=object))
        assert [str(one) for one in zarr.open_group(path, mode="r")["text"][:]] == texts


NASTY = st.sampled_from(
    ['"stored":{', ',"stored":{},"tags":[', '"zarrtrace":{', '"blake2b":"', "é", "", "\\"]
)


@given(
    st.dictionaries(NASTY, NASTY),
    st.dictionaries(st.sampled_from(["1", "20", "tokens", "metadata"]), st.integers()),
)
def test_journals_are_replaced_as_json(names: dict[str, str], journal: dict[str, Any]) -> None:
    attributes = {
        "attention_dtype": "float32",
        "prompt": "".join([*names, *names.values()]),
        "spans": names,
        "stored": {"metadata": {"attention": {"bytes": 1}}},
        "tags": [*names],
        "versions": {"zarrtrace": "1"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        create_arrays(path, {NAMESPACE: sealed(attributes), "coordinates": "key_token"}, {})
        # The first time all is read and written as JSON; then it is on one line.
        replace_journal(path, canonical({}))
        replace_journal(path, canonical(journal))
        found = read_group(path)
        assert found["attributes"][NAMESPACE] == sealed({**attributes, "stored": journal})
        assert not seal_broken(found["attributes"][NAMESPACE])
        assert found["attributes"]["coordinates"] == "key_token"
        assert found["node_type"] == "group"
