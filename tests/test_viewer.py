"""The viewer's files: what a bundle holds, and the server that makes the same on demand."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import fakes
import many_traces
import numpy as np
import pytest
import rounding
import zarr
from click.testing import CliRunner
from processes import running, said_after

import zarrtrace as zt
from zarrtrace.analysis import contrast, word_associations
from zarrtrace.cli import bundle_, view_
from zarrtrace.errors import ConfigError, IncompleteError, ScenarioError
from zarrtrace.index.neuronpedia import source_of
from zarrtrace.records import LayerRecord, TokensRecord
from zarrtrace.store import RunWriter
from zarrtrace.store.metadata import read_trace
from zarrtrace.store.seal import sealed_group
from zarrtrace.viewer import Layout, Server, plan, write_bundle
from zarrtrace.viewer.bundle import single_page

GROUPS = ("Safe_1", "Risky_2", "Safe_3", "Risky_4")


def get(url: str, path: str, *, host: str | None = None, method: str = "GET"):
    """Ask for a path below the page's address, exactly as written."""
    at = urlsplit(url)
    path = at.path.removesuffix("/") + path
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or at.netloc)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), body


def json_of(content: bytes) -> dict:
    return json.loads(gzip.decompress(content))


def scenario_of(layout: Layout, name: str) -> dict:
    return json_of(layout.read(f"data/@scenarios/{name}.json.gz"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    return fakes.make_run(
        tmp_path_factory.mktemp("whole"), scenarios=GROUPS, tokens=[7, 9, 7, 8], active=0.6
    )


@pytest.fixture(scope="module")
def server(whole: fakes.FakeRun) -> Iterator[Server]:
    with Server(whole.path) as found:
        yield found


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes",
    [
        {"scenarios": GROUPS, "tokens": [7, 9, 7, 8], "active": 0.6},
        {"tokens": 300, "layers": (0, 2), "scenarios": ("Long",)},
        {"attention": False},
        {"features": 0},
        {"attention_dtype": "float16", "feature_dtype": "float16", "without_sae": (2,)},
        {"drop": {"Risky_2": (2,)}},
    ],
    ids=["groups", "long", "no attention", "no features", "float16", "incomplete"],
)
def test_live_server_and_bundle_are_equal_byte_for_byte(tmp_path: Path, sizes: dict) -> None:
    run = fakes.make_run(tmp_path, **sizes)
    layout, expected = plan(run.path, tmp_path / "bundle")
    written = write_bundle(layout, tmp_path / "bundle")
    files = fakes.files_in(tmp_path / "bundle")
    assert written == sum(map(len, files.values()))
    assert sorted(files) == sorted(layout.files())
    assert abs(expected.files - len(files)) <= 1
    assert expected.bytes == pytest.approx(written, rel=0.5)
    # A live view says where the run is, too.
    index = files.pop("index.json")
    with Server(run.path) as live:
        found = json.loads(get(live.url, "/index.json")[2])
        assert found.pop("source")["arguments"] == repr(str(run.path))
        assert found == json.loads(index)
        for name, content in files.items():
            assert get(live.url, f"/{name}")[::2] == (200, content), name


def test_two_saes_of_a_layer_are_both_there(tmp_path: Path) -> None:
    sizes = {"features": {"features": 40, "features_mlp": 48}}
    records = list(fakes.make_records(**sizes))
    with RunWriter(tmp_path / "run", ["Safe_1"], fakes.CONFIG) as run:
        writer = run.trace(fakes.make_plan("Safe_1", **sizes))
        for record in records:
            writer.append(record)
        writer.finish()
        run.finish()
    write_bundle(Layout(tmp_path / "run"), tmp_path / "bundle")
    truth = fakes.truth_of(records, fakes.LAYERS, fakes.make_tokens(7))
    group = zarr.open_group(tmp_path / "bundle/data/Safe_1", mode="r")
    for name in ("features", "features_mlp", "top_feature_mlp", "top_activation_mlp"):
        np.testing.assert_array_equal(group[name][:], truth[name], err_msg=name)


def test_a_live_view_knows_where_the_run_is_and_a_bundle_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.make_run(tmp_path, name="runs/uni")
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(Server("runs/uni")) as server:
        live = json.loads(server.layout.index)
    assert live["source"] == {"call": "open_run", "arguments": "'runs/uni'"}
    write_bundle(Layout(tmp_path / "runs" / "uni"), "bundle")
    for file in fakes.files_in(tmp_path / "bundle").values():
        text = gzip.decompress(file) if file[:2] == b"\x1f\x8b" else file
        assert str(tmp_path).encode() not in text
    assert "source" not in json.loads((tmp_path / "bundle" / "index.json").read_text())


def test_plain_zarr_reads_a_bundle(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Long",), tokens=300, features=40)
    write_bundle(Layout(run.path), tmp_path / "bundle")
    group = zarr.open_group(tmp_path / "bundle/data", mode="r")
    truth = run.truth["Long"]
    names = [name for name in truth if truth[name].ndim > 1 and truth[name].dtype != object]
    assert {"attention", "attention_mean", "features", "next_token"} <= set(names)
    for name in names:
        assert group[f"Long/{name}"].shards is None
        np.testing.assert_array_equal(group[f"Long/{name}"][:], truth[name], err_msg=name)


def test_float16_is_exact_as_float32(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, attention_dtype="float16", feature_dtype="float16")
    write_bundle(Layout(run.path), tmp_path / "bundle")
    for name in ("attention", "features"):
        found = zarr.open_array(tmp_path / "bundle/data/Safe_1" / name, mode="r")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found[:], run.truth["Safe_1"][name].astype(np.float32))


def test_chunks_are_gzip_without_time(whole: fakes.FakeRun) -> None:
    layout = Layout(whole.path)
    first = layout.read("data/Safe_1/attention/c/0/0/0/0")
    assert first[4:8] == b"\0\0\0\0"
    values = np.frombuffer(gzip.decompress(first), "<f4").reshape(2, 7, 7)
    np.testing.assert_array_equal(values, whole.truth["Safe_1"]["attention"][0])
    assert layout.read("data/Safe_1/attention/c/0/0/0/0") == first


def test_index_says_what_the_run_says(whole: fakes.FakeRun, server: Server) -> None:
    index = json.loads(get(server.url, "/index.json")[2])
    ds = zt.open_trace(whole.path / "Risky_2")
    assert index["scenarios"] == list(GROUPS)
    found = json_of(get(server.url, "/data/@scenarios/Risky_2.json.gz")[2])
    assert found["tokens"] == ds.query_token.values.tolist()
    assert found["token_ids"] == ds.token_id.values.tolist()
    assert found["spans"]["balance"] == zt.span(ds, "balance")
    assert found["layers"] == ds.layer.values.tolist()
    assert found["tags"] == ["risky"]
    assert found["arrays"].pop("attention_to_spans")["places"] == [
        "balance",
        "decision",
        "@strongest",
    ]
    for name, array in found["arrays"].items():
        assert array["shape"] == list(ds[name].shape)
        assert array["dims"] == list(ds[name].dims)


def test_ids_of_prompts_options_and_next_tokens_have_texts(whole: fakes.FakeRun) -> None:
    for name, truth in whole.truth.items():
        expected = {"3": "1"}  # the option
        for ids, texts in (("token_id", "key_token"), ("next_token", "next_token_text")):
            numbers = map(str, truth[ids].flat)
            expected |= dict(zip(numbers, truth[texts].flat, strict=True))
        assert scenario_of(Layout(whole.path), name)["vocabulary"] == expected


def test_a_trace_without_next_tokens_yet_has_no_text_for_none(tmp_path: Path) -> None:
    writer = fakes.make_trace_writer(tmp_path / "run", "Safe_1")
    with RunWriter(tmp_path / "run", ["Safe_1"], fakes.CONFIG):
        writer.append(next(fakes.make_records("Safe_1")))
    found = scenario_of(Layout(tmp_path / "run"), "Safe_1")
    assert found["missing"] == [2, 3]
    assert str(2**32 - 1) not in found["vocabulary"]


def test_saes_that_neuronpedia_shows_are_linked(tmp_path: Path) -> None:
    plan_of = fakes.make_plan("Safe_1", without_sae=(2,))
    saes = tuple(
        sae.model_copy(update={"release": "llama_scope_lxr_8x", "id": f"l{sae.layer}r_8x"})
        for sae in plan_of.saes
    )
    with RunWriter(tmp_path / "run", ["Safe_1"], fakes.CONFIG) as run:
        with run.trace(replace(plan_of, saes=saes)) as writer:
            for record in fakes.make_records("Safe_1", without_sae=(2,)):
                writer.append(record)
        run.finish()
    assert scenario_of(Layout(tmp_path / "run"), "Safe_1")["sources"] == {
        "features": {str(n): f"llama3.1-8b/{n}-llamascope-res-32k" for n in (1, 3)}
    }


def only_rows(record: LayerRecord | TokensRecord, rows: list[int]) -> LayerRecord | TokensRecord:
    if isinstance(record, TokensRecord):
        return record
    return replace(
        record,
        attention=record.attention[:, rows],
        attention_mean=record.attention_mean[rows],
    )


@pytest.mark.long
@pytest.mark.parametrize("tokens", [7, 300])
def test_rows_that_were_not_chosen_are_nan(tmp_path: Path, tokens: int) -> None:
    queries = (2, tokens - 1)
    planned = fakes.make_plan("Safe_1", tokens=tokens, features=0)
    records = list(fakes.make_records("Safe_1", tokens=tokens, features=0))
    with RunWriter(tmp_path / "run", ["Safe_1"], fakes.CONFIG) as run:
        with run.trace(replace(planned, attention_positions=queries)) as writer:
            for record in records:
                writer.append(only_rows(record, list(queries)))
        run.finish()
    write_bundle(Layout(tmp_path / "run"), tmp_path / "bundle")
    group = zarr.open_group(tmp_path / "bundle/data/Safe_1", mode="r")
    truth = fakes.truth_of(records, fakes.LAYERS, planned.tokens)
    for name in ("attention", "attention_mean"):
        expected = np.full_like(truth[name], np.nan)
        expected[..., queries, :] = truth[name][..., queries, :]
        np.testing.assert_array_equal(group[name][:], expected)
        assert group[name].metadata.dimension_names[-2:] == ("query", "key")


@pytest.mark.parametrize("tokens", [20, 300])
def test_the_map_of_heads_sums_over_spans(tmp_path: Path, tokens: int) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Safe_1",), tokens=tokens)
    layout = Layout(run.path)
    truth = run.truth["Safe_1"]["attention"]
    balance = zt.span(zt.open_trace(run.path / "Safe_1"), "balance")
    for query in (0, 1, 15, 16, tokens - 1):
        array = layout.arrays["Safe_1/attention_to_spans"]
        step = array.chunks[0]
        content = gzip.decompress(
            layout.read(f"data/Safe_1/attention_to_spans/c/{query // step}/0/0/0")
        )
        found = np.frombuffer(content, "<f4").reshape(array.chunks)[query % step]
        row = truth[:, :, query]
        np.testing.assert_allclose(
            found[..., 0], row[..., balance].sum(-1), rtol=rounding.unit("float32") * 4
        )
        np.testing.assert_array_equal(found[..., 1], row[..., tokens - 1])
        others = [key for key in range(1, tokens) if key != query]
        np.testing.assert_array_equal(found[..., 2], row[..., others].max(-1))


def test_words_equal_the_analysis(whole: fakes.FakeRun) -> None:
    layout = Layout(whole.path)
    arrays = {name: _run_array(layout, name) for name in ("word", "word_score", "word_count")}
    words = json.loads(layout.index)["run"]["word"]["words"]
    table = word_associations(zt.open_run(whole.path), top=5).to_dataframe()
    for (layer, feature), rows in table.groupby(["layer", "feature"]):
        at = (fakes.LAYERS.index(layer), feature)
        known = arrays["word_count"][at] > 0
        assert [words[i] for i in arrays["word"][at][known]] == rows["word"].tolist()
        np.testing.assert_array_equal(arrays["word_score"][at][known], rows["score"])
        np.testing.assert_array_equal(arrays["word_count"][at][known], rows["count"])
    assert (arrays["word_count"] > 0).sum() == len(table)


def test_contrasts_equal_the_analysis(whole: fakes.FakeRun) -> None:
    layout = Layout(whole.path)
    found = _run_array(layout, "contrast")
    info = json.loads(layout.index)["run"]["contrast"]
    assert info["pairs"] == [["safe", "risky"]]
    table = contrast(zt.open_run(whole.path), "safe", "risky").to_dataframe()
    assert len(table) > 10
    assert np.isfinite(found[..., 0]).sum() == len(table)
    for row in table.reset_index().itertuples():
        values = found[0, fakes.LAYERS.index(row.layer), row.feature]
        expected = [getattr(row, name) for name in info["statistics"]]
        np.testing.assert_array_equal(values, np.asarray(expected, np.float32))


def _run_array(layout: Layout, name: str) -> np.ndarray:
    array = layout.arrays[f"@run/{name}"]
    out = np.empty(array.shape, array.dtype)
    for place in array.grid():
        file = f"data/@run/{name}/c/{'/'.join(map(str, place))}"
        chunk = np.frombuffer(gzip.decompress(layout.read(file)), np.dtype(array.dtype))
        box = tuple(
            slice(at * step, min(n, (at + 1) * step))
            for at, step, n in zip(place, array.chunks, array.shape, strict=True)
        )
        part = chunk.reshape(array.chunks)
        out[box] = part[tuple(slice(s.stop - s.start) for s in box)]
    return out


def test_eight_bits_round_to_the_nearest_step(whole: fakes.FakeRun) -> None:
    array = Layout(whole.path, eight_bit=True).arrays["Safe_1/attention"]
    codes = np.frombuffer(array.chunk((0, 0, 0, 0)), np.uint8).reshape(2, 7, 7)
    exact = whole.truth["Safe_1"]["attention"][0]
    # Scaled in float32 before it is rounded to a step.
    rounding.assert_close(
        codes * array.attributes["scale"], exact, 0.5 / 254 + rounding.rounding("float32", 1)
    )
    assert array.attributes["bits"] == 8


def test_eight_bits_keep_missing_values(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, drop={"Risky_2": (2,)})
    array = Layout(run.path, eight_bit=True).arrays["Risky_2/attention"]
    assert set(array.chunk((1, 0, 0, 0))) == {array.attributes["missing"]}


# --- choosing, limits, single file -----------------------------------------------------------


def test_scenarios_and_layers_are_chosen(whole: fakes.FakeRun) -> None:
    layout = Layout(whole.path, scenarios=["Risky_4", "Safe_1"], layers=[1, 3])
    index = json.loads(layout.index)
    assert index["scenarios"] == ["Safe_1", "Risky_4"]
    values = np.frombuffer(
        gzip.decompress(layout.read("data/Safe_1/attention/c/1/0/0/0")), np.float32
    )
    np.testing.assert_array_equal(values, whole.truth["Safe_1"]["attention"][2].ravel())
    assert scenario_of(layout, "Safe_1")["arrays"]["attention"]["layers"] == [1, 3]


@pytest.mark.long
def test_a_large_run_is_listed_in_parts_and_read_when_asked_for(tmp_path: Path) -> None:
    """20,000 scenarios: the first part and the last have traces, one of them damaged."""
    names = many_traces.names_of(20_000)
    run = many_traces.make_many(tmp_path, 3)
    many_traces.write_run(run, names)
    first = read_trace(run / names[0])
    for number, name in enumerate(names[3:], 3):
        (run / name).mkdir()
        if number >= len(names) - 10:
            metadata = {"number": number}
            attributes = first.attributes.model_copy(
                update={"scenario": name, "tags": ("late",), "metadata": metadata}
            )
            (run / name / "zarr.json").write_bytes(sealed_group(attributes, first.nodes))
    broken = run / names[-1] / "zarr.json"
    broken.write_bytes(broken.read_bytes().replace(b"late", b"lat3"))
    with Server(run) as live:
        assert json.loads(get(live.url, "/index.json")[2])["scenarios"] == names
        part = json_of(get(live.url, "/data/@listing/39.json.gz")[2])
        assert part["tags"] == [None] * 490 + [["late"]] * 9 + [None]
        assert part["metadata"][490:499] == [{"number": n} for n in range(19_990, 19_999)]
        assert get(live.url, "/data/@listing/40.json.gz")[0] == 404
        assert json_of(get(live.url, "/data/@listing/0.json.gz")[2])["tags"][:4] == [
            ["safe"],
            ["risky"],
            ["safe"],
            None,
        ]
        found = json_of(get(live.url, f"/data/@scenarios/{names[2]}.json.gz")[2])
        assert found["tokens"] == zt.open_trace(run / names[2]).key_token.values.tolist()
        chunk = get(live.url, f"/data/{names[2]}/attention/c/0/0/0/0")
        values = np.frombuffer(gzip.decompress(chunk[2]), np.float32)
        stored = zt.open_trace(run / names[2]).attention.values
        np.testing.assert_array_equal(values, stored[0].ravel())
        status, _, said = get(live.url, f"/data/@scenarios/{names[-1]}.json.gz")
        assert status == 500
        assert b"not the metadata that was written" in said


@pytest.mark.parametrize("what", [{"scenarios": ["Nowhere"]}, {"layers": [77]}])
def test_unknown_choices_are_refused(whole: fakes.FakeRun, what: dict) -> None:
    with pytest.raises((ConfigError, ScenarioError), match=r"Nowhere|77"):
        Layout(whole.path, **what)


def test_a_trace_alone_is_a_run_of_one(whole: fakes.FakeRun) -> None:
    index = json.loads(Layout(whole.path / "Safe_1").index)
    assert index["scenarios"] == ["Safe_1"]


def test_a_run_without_scenarios_says_so(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, drop=dict.fromkeys(fakes.SCENARIOS, fakes.LAYERS))
    shutil.rmtree(run.path / ".staged")
    with pytest.raises(IncompleteError, match="no scenario"):
        Layout(run.path)


def test_limit_is_kept_and_leaves_nothing(whole: fakes.FakeRun, tmp_path: Path) -> None:
    for output in (tmp_path / "out/bundle", tmp_path / "out/page.html"):
        with pytest.raises(ConfigError, match="above the limit"):
            write_bundle(Layout(whole.path), output, max_bytes=10_000)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_there_is_kept(whole: fakes.FakeRun, tmp_path: Path) -> None:
    layout = Layout(whole.path, scenarios=["Safe_1"])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="exists"):
            write_bundle(layout, precious, overwrite=overwrite)
    for output in (tmp_path / "bundle", tmp_path / "page.html"):
        write_bundle(layout, output)
        with pytest.raises(ConfigError, match="overwrite"):
            write_bundle(layout, output)
        write_bundle(layout, output, overwrite=True)
    assert (precious / "file").read_text() == "x"


def test_a_pipe_in_place_of_a_bundle_s_index_is_not_waited_for(
    whole: fakes.FakeRun, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    os.mkfifo(bundle / "index.json")
    with pytest.raises(ConfigError, match=r"its index.json is not that of a bundle"):
        write_bundle(Layout(whole.path), bundle, overwrite=True)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_kill_while_replacing_loses_no_bundle(
    whole: fakes.FakeRun, tmp_path: Path, *, overwrite: bool
) -> None:
    """Where folders cannot be exchanged, between the two renames."""
    layout, bundle = Layout(whole.path, scenarios=["Safe_1"]), tmp_path / "bundle"
    write_bundle(layout, bundle)
    before = fakes.files_in(bundle)
    left = tmp_path / ".bundle.zarrtrace-bundle-x"
    left.mkdir()
    write_bundle(layout, left / "whole")
    bundle.rename(left / "whole.old")
    if overwrite:
        write_bundle(layout, bundle, overwrite=True)
    else:
        with pytest.raises(ConfigError, match="overwrite"):
            write_bundle(layout, bundle)
    assert fakes.files_in(bundle) == before
    assert list(tmp_path.iterdir()) == [bundle]


def test_no_name_ends_the_element_of_a_single_page() -> None:
    page = single_page({"data/</script><img src=x>/c/0": "AAAA"}).decode()
    assert "</script><img" not in page
    assert "'self'" not in page.split("</head>")[0]


def test_a_single_file_holds_the_same_bytes(whole: fakes.FakeRun, tmp_path: Path) -> None:
    layout = Layout(whole.path)
    written = write_bundle(layout, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert written == len(page.encode())
    found = re.search(r'<script type="application/json" id="bundle-files">(.*?)</script>', page)
    held = {name: base64.b64decode(content) for name, content in json.loads(found[1]).items()}
    needed = [
        name for name in layout.files() if name.endswith((".gz", "index.json")) or "/c/" in name
    ]
    assert sorted(held) == sorted(needed)
    for name in needed:
        assert held[name] == layout.read(name), name
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=[\"'](?!data:)", page)


@pytest.mark.long
def test_large_single_files_are_rounded(whole: fakes.FakeRun, tmp_path: Path) -> None:
    layout, expected = plan(whole.path, tmp_path / "page.html", eight_bit_from=1000)
    assert layout.eight_bit
    assert expected.eight_bit
    assert not plan(whole.path, tmp_path / "page.html")[1].eight_bit
    assert not plan(whole.path, tmp_path / "folder", eight_bit_from=1000)[1].eight_bit


# --- the server --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/data",
        "/data/",
        "/data/Safe_1",
        "/data/Safe_1/attention/",
        "/data/Safe_1/attention/c/0/0/0/1",
        "/data/Safe_1/attention/c/00/0/0/0",
        "/data/Safe_1/attention/c/" + "9" * 5000 + "/0/0/0",
        "/data/Safe_1/attention/c/-1/0/0/0",
        "/data/Safe_1/attention/c/%D9%A1/0/0/0",
        "/data/Safe_1/attention/c/0/0/0",
        "/data/Nobody/attention/zarr.json",
        "/../zarr.json",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/data/..%2f..%2fzarr.json",
        "/data/Safe_1/../../zarr.json",
        "//etc/passwd",
        "/data/Safe_1/attention%00/zarr.json",
        "/data/Safe_1/%ff/zarr.json",
        "/data/@scenarios/Nobody.json.gz",
        "/data/@scenarios/Safe_1",
        "/data/@listing/1.json.gz",
        "/data/@listing/00.json.gz",
        "/data/@listing/../../index.json",
        "/page/main.js",
        "/layout.py",
    ],
)
def test_unknown_paths_are_not_found(server: Server, path: str) -> None:
    assert get(server.url, path)[0] == 404


def test_the_page_and_its_headers(server: Server, whole: fakes.FakeRun) -> None:
    status, headers, body = get(server.url, "/")
    assert status == 200
    assert body == get(server.url, "/index.html?query=ignored")[2]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert not any(name.lower().startswith("access-control") for name in headers)
    status, headers, body = get(server.url, "/index.json", method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == len(Layout(whole.path, is_live=True).index)
    assert get(server.url, "/", method="POST")[0] == 501


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "localhost:1"])
def test_another_host_name_is_refused(server: Server, host: str) -> None:
    assert get(server.url, "/index.json", host=host)[0] == 403


def test_localhost_is_this_machine(server: Server) -> None:
    assert get(server.url, "/", host=f"localhost:{server.port}")[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
def test_nothing_is_served_without_the_token(whole: fakes.FakeRun, host: str) -> None:
    with Server(whole.path, host=host) as live:
        secret = urlsplit(live.url).path
        assert len(secret) > 20
        at = f"http://127.0.0.1:{live.port}/"
        for path in ("/", "/index.json", "/data/Safe_1/attention/zarr.json", secret[:-2] + "/"):
            status, headers, body = get(at, path)
            assert (status, body) == (404, b"Not found.\n")
            assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert get(at, secret)[0] == 200
        # A name that was pointed at this machine is another page's, unless others may reach us.
        expected = 403 if live.loopback else 200
        assert get(at, secret + "index.json", host="anything:1")[0] == expected


def said(server: Server, request: bytes) -> bytes:
    """Send bytes, and return all that comes back until the connection is closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_request_has_one_answer(server: Server) -> None:
    path = urlsplit(server.url).path.encode()
    host = f"Host: 127.0.0.1:{server.port}\r\n".encode()
    hidden = b"GET " + path + b"index.json HTTP/1.1\r\n" + host + b"\r\n"
    for method, head in (
        (b"GET", b"Content-Length: %d\r\n" % len(hidden)),
        (b"GET", b"Transfer-Encoding: chunked\r\n"),
        (b"GET", b"Content-Length: 5\r\nExpect: 100-continue\r\n"),
        (b"POST", b"Content-Length: %d\r\n" % len(hidden)),
    ):
        asked = method + b" " + path + b"style.css HTTP/1.1\r\n" + host + head + b"\r\n" + hidden
        answer = said(server, asked)
        assert answer.count(b"HTTP/1.1 ") == 1, (method, head)
        assert b"Connection: close" in answer


@pytest.mark.parametrize(
    "request_line",
    [b"nonsense", b"GET / HTTP/9.9", b"GET /" + b"a" * 70_000 + b" HTTP/1.1", b"PUT / HTTP/1.1"],
    ids=["nonsense", "version", "long", "method"],
)
def test_every_answer_has_the_policy(server: Server, request_line: bytes) -> None:
    answer = said(server, request_line + b"\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 ")
    assert b"Content-Security-Policy: default-src 'none'" in head
    assert b"<" not in body


@pytest.mark.long
def test_connections_are_limited(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        idle = [
            stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(64)
        ]
        with socket.create_connection(address, timeout=30) as further:
            answer = b"".join(iter(lambda: further.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Content-Security-Policy" in answer
        idle[0].close()
    # Threads notice closed connections by themselves.
    for _ in range(100):
        if get(server.url, "/")[0] == 200:
            return
        time.sleep(0.05)
    raise AssertionError("no connection was given back")


def test_a_taken_port_is_named(server: Server, whole: fakes.FakeRun) -> None:
    with pytest.raises(ConfigError, match=f"port {server.port}"):
        Server(whole.path, port=server.port)


def test_damage_stays_where_it_is(run: fakes.FakeRun) -> None:
    file = run.path / "Safe_1/attention/c.0.0.0.0"
    content = bytearray(file.read_bytes())
    content[40] ^= 0xFF  # layer 1 comes first
    file.write_bytes(content)
    with Server(run.path) as live:
        status, _, body = get(live.url, "/data/Safe_1/attention/c/0/0/0/0")
        assert status == 500
        assert b"cannot be read" in body
        assert get(live.url, "/data/Safe_1/attention/c/1/0/0/0")[0] == 200


def test_a_folder_is_advised_for_the_limit_of_one_html_file(
    whole: fakes.FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zarrtrace.viewer.bundle.MAX_HTML_BYTES", 10_000)
    with pytest.raises(ConfigError, match="write a folder in place of a single file"):
        write_bundle(Layout(whole.path), tmp_path / "b.html")


# --- commands ----------------------------------------------------------------------------------


def test_bundle_command(whole: fakes.FakeRun, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = [str(whole.path), "-o", str(output), "--scenario", "Safe_1", "--layers", "1-2"]
    found = CliRunner().invoke(bundle_.command, arguments, catch_exceptions=False)
    assert found.exit_code == 0
    assert found.stdout == f"{output}\n"
    assert found.stderr.startswith("about ")
    assert [p.name for p in (output / "data").iterdir() if p.name[0] not in "@z"] == ["Safe_1"]
    for name in ("b", "b.html"):
        with pytest.raises(ConfigError, match="above the limit") as caught:
            CliRunner().invoke(
                bundle_.command,
                [str(whole.path), "-o", str(tmp_path / name), "--max-size", "1.5kB"],
                catch_exceptions=False,
            )
        named = re.findall("--[a-z-]+", caught.value.remedy)
        assert {*named} <= {one for p in bundle_.command.params for one in p.opts}
        assert "folder" not in caught.value.remedy
    bad = CliRunner().invoke(bundle_.command, [*arguments, "--max-size", "much"])
    assert bad.exit_code == 2


@pytest.mark.long
def test_view_command_stops_on_interrupt(whole: fakes.FakeRun) -> None:
    with running("view", whole.path, "--no-browser") as process:
        url = process.stdout.readline().strip()
        assert get(url, "/index.json")[0] == 200
        error = said_after(process)
    assert process.returncode == 0
    assert error == "Ctrl-C stops.\n"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", urlsplit(url).port)) != 0


@pytest.mark.parametrize(("arguments", "opened"), [([], 1), (["--no-browser"], 0)])
def test_view_command_opens_the_page(
    whole: fakes.FakeRun, arguments: list[str], opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_self: Server) -> None:
        raise KeyboardInterrupt

    asked: list[str] = []
    monkeypatch.setattr("webbrowser.open", asked.append)
    monkeypatch.setattr(Server, "run", interrupted)
    found = CliRunner().invoke(view_.command, [str(whole.path), *arguments], catch_exceptions=False)
    assert found.exit_code == 0
    assert asked == [found.stdout.strip()] * opened


@pytest.mark.parametrize(
    ("release", "sae", "expected"),
    [
        ("llama_scope_lxr_8x", "l14r_8x", "llama3.1-8b/14-llamascope-res-32k"),
        ("gpt2-small-res-jb", "blocks.8.hook_resid_pre", "gpt2-small/8-res-jb"),
        (
            "gemma-scope-2b-pt-res-canonical",
            "layer_20/width_16k/canonical",
            "gemma-2-2b/20-gemmascope-res-16k",
        ),
        (None, "l14r_8x", None),
        ("someone/else", "l14r_8x", None),
    ],
)
def test_neuronpedia(release: str | None, sae: str, expected: str | None) -> None:
    assert source_of(release, sae) == expected
