"""``zarr.json`` equals what zarr-python writes, is sealed, and is read only if it is format 2."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec

import zarrtrace as zt
from zarrtrace.errors import FormatVersionError, IntegrityError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.index_layout import index_layout
from zarrtrace.format.layout import ArrayLayout, Limits, TraceShape, trace_layout
from zarrtrace.store import RunWriter, kind_of, read_run, read_trace, summarize, verify
from zarrtrace.store.chunks import encode_file
from zarrtrace.store.codecs import ArrayEncoding
from zarrtrace.store.metadata import read_index_group
from zarrtrace.store.nodes import array_metadata, encoded, layout_of
from zarrtrace.store.seal import seal_holds, sealed_group

LAYOUTS = {
    **trace_layout(
        TraceShape(
            layers=3,
            tokens=300,
            heads=2,
            features={"features": 9000, "features_mlp_out": 24},
            channels=4096,
            attention_dtype="float16",
            attention_layers=2,
            sae_fields=("sae_id",),
        )
    ),
    **{
        f"long_{name}": layout
        for name, layout in trace_layout(
            TraceShape(
                layers=2,
                tokens=50,
                heads=2,
                features={"features": 24},
                feature_dtype="float16",
                channels=24,
                residual_dtype="float16",
                attention_positions=3,
                next_token=False,
                limits=Limits(file_bytes=2**10, keys=16, queries=4, tokens=8, features=16),
            )
        ).items()
    },
    **{f"index_{name}": one for name, one in index_layout(2, {"features": 3000}, 7).items()},
}


# --- arrays ------------------------------------------------------------------------------------


def made_by_zarr(folder: Path, layout: ArrayLayout) -> dict[str, Any]:
    """Return what zarr-python writes for an array of the format's codecs."""
    text, one_byte = layout.dtype == "string", layout.dtype == "bool"
    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", blocksize=2**19)
    compressor = blosc if layout.codec == "shuffle" else ZstdCodec(level=1, checksum=False)
    zarr.create_array(
        folder,
        shape=layout.shape,
        dtype=str if text else layout.dtype,
        chunks=layout.chunks,
        shards=layout.shards,
        dimension_names=layout.dims,
        fill_value=layout.fill_value,
        attributes=dict(layout.attributes),
        # Types of one byte have no order of bytes.
        serializer="auto" if text else BytesCodec(endian=None if one_byte else "little"),
        compressors=[compressor, Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    found: dict[str, Any] = json.loads((folder / "zarr.json").read_bytes())
    return found


def plain(node: Any) -> Any:
    """Leave out what versions of zarr-python write or omit, and means nothing."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if value not in ({}, [])}
    return [plain(value) for value in node] if isinstance(node, list) else node


@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_are_what_zarr_creates(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    expected = made_by_zarr(tmp_path / "zarr", layout)
    assert plain(array_metadata(layout)) == plain(expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_back(name: str) -> None:
    node = json.loads(encoded(array_metadata(LAYOUTS[name])))
    found, codec = layout_of(node), "shuffle" if LAYOUTS[name].codec == "shuffle" else "plain"
    # NaN is unequal to itself, and sparse arrays are stored as others are.
    assert repr(found) == repr(LAYOUTS[name].model_copy(update={"codec": codec}))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features", lambda node: node["attributes"].update(scale_factor=2.0)),
        ("features", lambda node: node["attributes"].update(_FillValue=0)),
        ("features", lambda node: outer(node)["codecs"].pop()),
        ("features", lambda node: outer(node)["index_codecs"].pop()),
        (
            "features",
            lambda node: outer(node).update(index_location="start"),
        ),
        ("features", lambda node: inner(node).insert(0, {"name": "transpose"})),
        ("features", lambda node: inner(node)[1].update(name="gzip")),
        ("features", lambda node: inner(node)[1]["configuration"].update(level=3)),
        ("attention", lambda node: inner(node)[1]["configuration"].update(blocksize=0)),
        ("attention", lambda node: inner(node)[1]["configuration"].update(cname="lz4")),
        ("features", lambda node: inner(node)[0]["configuration"].update(endian="big")),
        ("features", lambda node: node["chunk_grid"].update(name="rectangular")),
        ("features", lambda node: node.update(storage_transformers=[{"name": "x"}])),
        ("features", lambda node: outer(node).update(chunk_shape=[1, 7, 5])),
        ("features", lambda node: outer(node).update(chunk_shape=[1, 0, 5])),
        ("next_token", lambda node: node["codecs"].pop()),
        ("next_token", lambda node: node["chunk_key_encoding"].update(name="v2")),
        (
            "next_token",
            lambda node: node["chunk_key_encoding"].update(configuration={"separator": "/"}),
        ),
    ],
)
def test_foreign_encodings_are_refused(name: str, change: Callable[[Any], object]) -> None:
    """They would change the meaning of bytes or numbers, and zarrtrace never writes them."""
    node = json.loads(encoded(array_metadata(LAYOUTS[name])))
    layout_of(node)
    change(node)
    with pytest.raises((ValueError, KeyError, TypeError)):
        ArrayEncoding(layout_of(node))


def outer(node: dict[str, Any]) -> Any:
    return node["codecs"][0]["configuration"]


def inner(node: dict[str, Any]) -> Any:
    return outer(node)["codecs"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=9))
def test_texts_are_what_zarr_reads(texts: list[str]) -> None:
    rows = min(4, len(texts))
    layout = ArrayLayout(
        dims=("key",), dtype="string", shape=(len(texts),), chunks=(rows,), fill_value=""
    )
    encoding = ArrayEncoding(layout)
    values = np.asarray(texts, dtype=object)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "zarr.json").write_bytes(encoded(array_metadata(layout)))
        for number, start in enumerate(range(0, len(texts), rows)):
            content, checksum = encode_file(encoding, values[start : start + rows])
            (path / f"c.{number}").write_bytes(content)
            assert checksum.bytes == len(content)
            found = encoding.decode(content)[: len(texts) - start]
            assert found.tolist() == texts[start : start + rows]
        assert [str(one) for one in zarr.open_array(path, mode="r")[:]] == texts


# --- groups ------------------------------------------------------------------------------------

NASTY = st.sampled_from(['"seal": "0000000000000000"', '"seal": "', "é🎰", "", "\\", '","seal":'])


@given(st.dictionaries(NASTY, NASTY), NASTY)
def test_any_text_in_the_attributes_is_sealed(names: dict[str, str], prompt: str) -> None:
    attributes = fakes.make_trace_attributes(prompt=prompt, tags=tuple(names), versions=names)
    content = sealed_group(attributes, {"features": array_metadata(LAYOUTS["features"])})
    assert seal_holds(content)
    plain = json.loads(content)["attributes"]
    plain.pop("coordinates")
    found = TraceAttributes.model_validate(plain)
    assert found.model_copy(update={"seal": None}) == attributes
    edited = json.loads(content)
    edited["attributes"]["prompt"] += "!"
    assert not seal_holds(encoded(edited))


def test_every_byte_of_a_group_is_sealed(run: fakes.FakeRun) -> None:
    for node in (run.path, run.trace):
        content = (node / "zarr.json").read_bytes()
        assert seal_holds(content)
        for at in range(0, len(content), max(1, len(content) // 300)):
            bad = bytearray(content)
            bad[at] ^= 1 << (at % 7)
            assert not seal_holds(bytes(bad)), at


@pytest.mark.parametrize("of_run", [True, False])
def test_edited_attributes_are_refused(run: fakes.FakeRun, *, of_run: bool) -> None:
    node = run.path if of_run else run.trace
    file = node / "zarr.json"
    file.write_text(file.read_text().replace("fake/model", "fake/other"))
    opening = zt.open_run if of_run else zt.open_trace
    with pytest.raises(IntegrityError, match="not the metadata that was written"):
        opening(node)


def test_a_group_holds_the_metadata_of_its_arrays(shared_run: fakes.FakeRun) -> None:
    trace = read_trace(shared_run.trace)
    run = read_run(shared_run.path)
    folders = {file.parent.name for file in shared_run.trace.glob("*/zarr.json")}
    assert set(trace.nodes) == folders
    for name, node in trace.nodes.items():
        assert json.loads((shared_run.trace / name / "zarr.json").read_text()) == node
        assert run.nodes[f"{shared_run.trace.name}/{name}"] == node


def test_attributes_are_short_and_flat(shared_run: fakes.FakeRun) -> None:
    attributes = zt.open_trace(shared_run.trace).attrs
    assert attributes["scenario"] == "Safe_1"
    assert attributes["layers"] == "1-3"
    assert attributes["layers_without_sae"] == ""
    assert attributes["tags"] == ["safe"]
    assert attributes["spans"]["balance"]["tokens"] == [1, 2]
    assert attributes["saes"]["features"]["hook_name"] == "blocks.{layer}.hook_resid_post"
    assert attributes["format_version"] == 2
    assert attributes["zarr_conventions"][0]["name"] == "zarrtrace"
    assert len(attributes) > 10  # xarray folds them
    for name, value in attributes.items():
        assert name in ("prompt", "spans") or len(json.dumps(value)) <= 500, name


# --- other formats -----------------------------------------------------------------------------


def format_1(folder: Path, kind: str) -> None:
    """Write a group as format 1 had it."""
    attributes = {"zarrtrace": {"format_version": 1, "kind": kind, "scenario": "Safe_1"}}
    zarr.create_group(folder, zarr_format=3, attributes=attributes)


def test_format_1_is_refused_with_a_sentence(tmp_path: Path) -> None:
    format_1(tmp_path / "run", "run")
    format_1(tmp_path / "run" / "Safe_1", "trace")
    before = fakes.files_in(tmp_path)
    run, trace = tmp_path / "run", tmp_path / "run" / "Safe_1"
    for opening, path in (
        (zt.open_run, run),
        (zt.open_trace, trace),
        (summarize, run),
        (verify, run),
        (kind_of, trace),
        (read_index_group, run),
    ):
        with pytest.raises(FormatVersionError, match=r"format version 1, .* does not read") as e:
            opening(path)  # type: ignore[operator]
        assert "Extract it again" in str(e.value)
        assert e.value.exit_code == 1
    for options in ({}, {"overwrite": True}, {"repair": True}):
        with pytest.raises(FormatVersionError), RunWriter(run, ["Safe_1"], {}, **options):
            pass
    assert fakes.files_in(tmp_path) == before


def test_a_newer_format_version_is_refused(run: fakes.FakeRun) -> None:
    for node in (run.path, run.trace):
        group = json.loads((node / "zarr.json").read_text())
        group["attributes"] |= {"format_version": 99, "surprise": True}
        (node / "zarr.json").write_text(json.dumps(group))
    for opening, path in ((zt.open_run, run.path), (zt.open_trace, run.trace)):
        with pytest.raises(FormatVersionError, match=r"(?s)version 99.*newer") as e:
            opening(path)
        assert e.value.exit_code == 1
    with pytest.raises(FormatVersionError):
        summarize(run.path)
