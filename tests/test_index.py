"""The index of a run: exact, independent of order, found in one small chunk an array."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import rounding
import xarray as xr
from chunk_reads import ChunkReads
from command_line import call
from hypothesis import given, settings
from hypothesis import strategies as st

import zarrtrace as zt
from zarrtrace.card import write_card
from zarrtrace.errors import ConfigError, IntegrityError, LockedError, NotATraceError, StoreError
from zarrtrace.format.index_layout import index_layout
from zarrtrace.index import build_index, find_feature
from zarrtrace.index.counting import FeatureCounts
from zarrtrace.store import kind_of, locked, summarize, summary, verify
from zarrtrace.store.chunks import encode_file
from zarrtrace.store.metadata import read_index_group
from zarrtrace.store.seal import sealed_group

NAMES = ("Safe_1", "Risky_2", "Medium_3", "Late_4")
SIZES: dict[str, Any] = {
    "scenarios": NAMES,
    "tokens": (7, 13, 5, 9),
    "features": {"features": 16, "features_mlp": 40},
    "active": 0.4,
}


def expected(
    run: fakes.FakeRun, array: str, layer: int, *, special: bool = False
) -> dict[str, np.ndarray]:
    """Return maximum, mean, frequency and strongest tokens by NumPy alone.

    The first token of each prompt is special.
    """
    first = 0 if special else 1
    blocks = [truth[array][layer][first:] for truth in run.truth.values()]
    every = np.concatenate(blocks).astype(np.float64)
    scenario = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
    position = np.concatenate([first + np.arange(len(block)) for block in blocks])
    order = np.argsort(-every, axis=0, kind="stable")[:20].T
    strongest = np.take_along_axis(every.T, order, 1)
    pad = ((0, 0), (0, max(0, 20 - order.shape[1])))
    return {
        "maximum": every.max(0),
        "mean": every.mean(0),
        "frequency": (every > 0).mean(0),
        "token_activation": np.pad(strongest, pad),
        "token_scenario": np.pad(np.where(strongest != 0, scenario[order], 0), pad),
        "token_position": np.pad(np.where(strongest != 0, position[order], 0), pad),
    }


def assert_index_is_right(
    run: fakes.FakeRun, arrays: tuple[str, ...], *, special: bool = False
) -> None:
    ds = xr.open_zarr(run.path / "index", consolidated=False)  # plain xarray reads it
    for array in arrays:
        suffix = array.removeprefix("features")
        for number, layer in enumerate(fakes.LAYERS):
            for name, value in expected(run, array, number, special=special).items():
                found = ds[f"{name}{suffix}"].sel(layer=layer).values
                if name in ("mean", "frequency"):  # stored in float32
                    rounding.assert_close(found, value, rounding.rounding("float32", 1, value))
                else:
                    np.testing.assert_array_equal(found, value)


def test_an_index_is_what_numpy_finds(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, **SIZES)
    done = build_index(run.path)
    assert done == ("built", 4, 4, 4)
    assert_index_is_right(run, ("features", "features_mlp"))
    assert build_index(run.path) == ("unchanged", 0, 4, 4)


def test_special_tokens_are_counted_if_asked_for(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, **SIZES)
    build_index(run.path)
    without = fakes.files_in(run.path / "index")
    assert build_index(run.path, special=True) == ("built", 4, 4, 4)
    assert_index_is_right(run, ("features", "features_mlp"), special=True)
    assert build_index(run.path, special=True).how == "unchanged"
    truth = run.truth["Risky_2"]["features"][0]
    feature = int((truth[0] - truth[1:].max(0)).argmax())  # BOS is the strongest
    every, usual = (find_feature(run.path, 1, feature, special=one) for one in (True, False))
    assert 0 in [one.position for one in every.tokens]
    assert usual.tokens == tuple(one for one in every.tokens if one.position > 0)[:20]
    assert (usual.special, usual.maximum) == (True, every.maximum)
    assert build_index(run.path).how == "built"
    assert fakes.files_in(run.path / "index") == without
    assert 0 not in [one.position for one in find_feature(run.path, 1, feature).tokens]
    with pytest.raises(ConfigError, match="leaves out special tokens"):
        find_feature(run.path, 1, feature, special=True)


def test_layers_without_an_sae_count_no_tokens(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, without_sae=(2,))
    build_index(run.path)
    ds = xr.open_zarr(run.path / "index", consolidated=False)
    assert ds["layer"].values.tolist() == [1, 3]
    assert ds["tokens"].values.tolist() == [12, 12]  # without BOS


def test_a_layer_that_one_of_several_saes_lacks_has_no_values(tmp_path: Path) -> None:
    run = fakes.make_run_of_two_saes(tmp_path)
    build_index(run.path)
    for at, (layer, array) in enumerate(((1, "features"), (2, "features_mlp"))):
        values = np.concatenate([truth[array][at][1:] for truth in run.truth.values()])
        assert find_feature(run.path, layer, 3, array=array).maximum == values[:, 3].max()
        message = f"layer {3 - layer} has no values of '{array}'"
        with pytest.raises(ConfigError, match=message) as caught:
            find_feature(run.path, 3 - layer, 3, array=array)
        assert caught.value.remedy == f"Layers that have values: {layer}."


def test_an_index_that_grew_equals_one_built_at_once(tmp_path: Path) -> None:
    part = fakes.make_run(tmp_path, name="run", drop={"Risky_2": (2,), "Late_4": (1,)}, **SIZES)
    assert build_index(part.path) == ("built", 2, 2, 4)
    run = fakes.make_run(tmp_path, name="run", **SIZES)
    assert build_index(run.path) == ("updated", 2, 4, 4)
    grown = fakes.files_in(run.path / "index")
    assert build_index(run.path, rebuild=True) == ("built", 4, 4, 4)
    assert fakes.files_in(run.path / "index") == grown
    assert_index_is_right(run, ("features", "features_mlp"))


def test_a_changed_scenario_is_counted_again(run: fakes.FakeRun, tmp_path: Path) -> None:
    build_index(run.path)
    other = fakes.make_run(tmp_path, name="other", scenarios=("Safe_1",), seed=5)
    shutil.rmtree(run.path / "Safe_1")
    shutil.copytree(other.path / "Safe_1", run.path / "Safe_1")
    (problem,) = (one for one in verify(run.path) if one.array == "index")
    assert problem.scenario == "Safe_1"
    assert build_index(run.path) == ("built", 2, 2, 2)
    now = run._replace(truth={**run.truth, "Safe_1": other.truth["Safe_1"]})
    assert_index_is_right(now, ("features",))


def test_readers_take_the_index_for_no_scenario(run: fakes.FakeRun) -> None:
    before, metadata = summarize(run.path), (run.path / "zarr.json").read_bytes()
    build_index(run.path)
    assert summarize(run.path) == before
    assert (run.path / "zarr.json").read_bytes() == metadata
    assert list(zt.open_run(run.path).children) == list(fakes.SCENARIOS)
    assert verify(run.path) == []
    assert kind_of(run.path) == "run"
    with xr.open_datatree(run.path, engine="zarr") as tree:
        assert set(tree.children) == set(fakes.SCENARIOS)
    with xr.open_datatree(run.path, engine="zarr", consolidated=False) as tree:
        assert set(tree.children) == {*fakes.SCENARIOS, "index"}
    # A run that is finished again keeps its index and its metadata.
    fakes.make_run(run.path.parent)
    assert (run.path / "zarr.json").read_bytes() == metadata
    assert build_index(run.path).how == "unchanged"


def test_an_index_is_no_trace(run: fakes.FakeRun) -> None:
    build_index(run.path)
    said = rf"(?s)run/index: is the index of a run, not .*Give the run: {run.path}\."
    for read in (kind_of, summarize, verify, write_card, zt.open_run, zt.open_trace):
        with pytest.raises(NotATraceError, match=said):
            read(run.path / "index")  # type: ignore[operator]


def test_a_trace_that_is_gone_is_not_counted(
    run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is removed between the look at its kind and the look at its arrays.
    monkeypatch.setattr(summary, "kind_of", lambda _: "trace")
    found = summarize(run.path / "gone")
    assert (found.complete, found.scenarios_complete) == (False, 0)


def test_find(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, **SIZES)
    build_index(run.path)
    truth = expected(run, "features_mlp", 1)
    found = find_feature(run.path, 2, 31, array="features_mlp", top=3)
    assert (found.indexed, found.scenarios) == (4, 4)
    assert found.maximum == truth["maximum"][31]
    assert [one.activation for one in found.tokens] == truth["token_activation"][31, :3].tolist()
    for rank, one in enumerate(found.tokens):
        scenario = NAMES[truth["token_scenario"][31, rank]]
        texts = run.truth[scenario]["query_token"]
        at = truth["token_position"][31, rank]
        assert (one.scenario, one.position, one.token) == (scenario, at, texts[at])
        assert one.before == "".join(texts[max(0, at - 6) : at])
        assert one.after == "".join(texts[at + 1 : at + 4])


def test_find_reads_little(
    tmp_path: Path, chunk_reads: ChunkReads, opened_files: list[str]
) -> None:
    run = fakes.make_run(tmp_path, layers=(1,), features=5000, heads=None, tokens=3)
    build_index(run.path)
    chunk_reads.clear()
    opened_files.clear()
    feature = int(np.argmax(run.truth["Safe_1"]["features"][0][1:].max(0)))
    assert find_feature(run.path, 1, feature, top=1).tokens
    chunks = chunk_reads.below(run.path / "index")
    assert set(chunks.values()) == {1}
    assert len(chunks) == 7  # six arrays, and the name of one scenario
    assert not [name for name in opened_files if name.endswith("run/zarr.json")]
    for layout in index_layout(31, {"features": 32_768}, 10**6).values():
        assert np.prod(layout.chunks) <= 1024 * 32


def test_equal_activations_go_by_order_of_the_run() -> None:
    counts = FeatureCounts(2)
    same = np.array([[1.0, 0.0]] * 15, np.float32)
    for scenario in (4, 1, 3):
        counts.add(scenario, same)
    found = counts.arrays()
    assert found["token_scenario"][0].tolist() == [1] * 15 + [3] * 5
    assert found["token_position"][0].tolist() == [*range(15), *range(5)]
    assert found["maximum"].tolist() == [1, 0]


@settings(max_examples=15)
@given(st.data())
def test_order_and_grouping_do_not_matter(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scale = data.draw(st.sampled_from([1e-6, 1.0, 1e9]))
    blocks = [
        np.round(rng.standard_cauchy((rng.integers(1, 30), 3)) * 4).astype(np.float32) / 3 * scale
        for _ in range(5)
    ]
    if data.draw(st.booleans()):
        blocks[2][0] = [np.nan, np.inf, -np.inf]
    once = FeatureCounts(3)
    for number, block in enumerate(blocks):
        once.add(number, block)
    groups = [FeatureCounts(3), FeatureCounts(3)]
    for number in data.draw(st.permutations(range(5))):
        groups[data.draw(st.integers(0, 1))].add(number, blocks[number])
    first = FeatureCounts.of_arrays(groups[0].arrays())  # as it comes from the disk
    first.merge(pickle.loads(pickle.dumps(groups[1])))  # noqa: S301 -- our own, as dask sends it
    for name, value in first.arrays().items():
        np.testing.assert_array_equal(value, once.arrays()[name])
    every = np.nan_to_num(np.concatenate(blocks).astype(np.float64), posinf=0, neginf=0, nan=0)
    clipped = np.clip(every, -(2.0**34), 2.0**34)
    mean = clipped.mean(0)
    # float32 holds the mean, and float64 the sums; 2**-50 is lost of each activation.
    lost = 2.0**-52 * np.abs(clipped).sum(0) + 2.0**-50
    assert (np.abs(once.arrays()["mean"] - mean) <= 2.0**-23 * np.abs(mean) + lost).all()
    np.testing.assert_array_equal(once.arrays()["active"], (every != 0).sum(0))
    order = np.argsort(-np.abs(every), axis=0, kind="stable")[:20]
    strongest = np.take_along_axis(every, order, 0).T
    found = once.arrays()["token_activation"][:, : len(order)]
    np.testing.assert_array_equal(found, strongest)
    np.testing.assert_array_equal(once.arrays()["maximum"], strongest[:, 0])


def test_damage_is_found(run: fakes.FakeRun) -> None:
    build_index(run.path)
    file = run.path / "index" / "token_activation" / "c.1.0.0"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (problem,) = verify(run.path)
    assert (problem.array, problem.layer) == ("index/token_activation", 2)
    for damage in (lambda: None, file.unlink, file.mkdir):
        damage()
        with pytest.raises(IntegrityError, match=r"token_activation/c\.1\.0\.0") as caught:
            find_feature(run.path, 2, 0)
        assert "zarrtrace index --rebuild" in caught.value.remedy
        assert find_feature(run.path, 1, 0).indexed == 2
    file.rmdir()
    assert build_index(run.path).how == "built"  # and not updated from damaged numbers
    assert verify(run.path) == []


def test_lost_features_are_not_counted_as_silent(run: fakes.FakeRun) -> None:
    (run.trace / "features/c.0.0.0").unlink()
    with pytest.raises(IntegrityError, match=r"features/c\.0\.0\.0: is gone"):
        build_index(run.path)
    assert not (run.path / "index").exists()
    assert not (run.path / ".staged").exists()


def test_a_killed_writer_leaves_nothing_that_counts(run: fakes.FakeRun) -> None:
    build_index(run.path)
    (run.path / ".staged/index/maximum").mkdir(parents=True)
    (run.path / "index").rename(run.path / ".staged/index.old")  # between two renames
    assert build_index(run.path).how == "unchanged"
    assert build_index(run.path, rebuild=True).how == "built"
    assert {file.name for file in run.path.iterdir()} == {"zarr.json", "index", *fakes.SCENARIOS}
    with locked(run.path), pytest.raises(LockedError):
        build_index(run.path)


def test_what_cannot_be_indexed_or_found(run: fakes.FakeRun, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no index") as caught:
        find_feature(run.path, 1, 0)
    assert "zarrtrace index" in caught.value.remedy
    build_index(run.path)
    for wrong in ({"layer": 9}, {"feature": 16}, {"array": "features_x"}, {"top": 21}):
        with pytest.raises(ConfigError):
            find_feature(run.path, **{"layer": 1, "feature": 0, **wrong})
    bare = fakes.make_run(tmp_path, name="bare", features=0)
    with pytest.raises(ConfigError, match="no scenario has features"):
        build_index(bare.path)


def test_a_foreign_name_leads_nowhere(run: fakes.FakeRun) -> None:
    build_index(run.path)
    group = read_index_group(run.path / "index")
    node = group.nodes["scenario"]
    content, checksum = encode_file(
        group.encodings["scenario"], np.array(["../../x", "../y"], object)
    )
    (run.path / "index/scenario/c.0").write_bytes(content)
    node["attributes"]["checksums"]["c.0"] = list(checksum)
    (run.path / "index/zarr.json").write_bytes(sealed_group(group.attributes, group.nodes))
    with pytest.raises(ConfigError, match="not safe"):
        find_feature(run.path, 1, int(np.argmax(run.truth["Safe_1"]["features"][0].max(0))))


def test_command_line(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, drop={"Risky_2": (2,)})
    made = call("index", run.path, "--threads", 1)
    assert (made.returncode, made.stderr) == (3, "")
    assert "1 of 2 in it" in made.stdout
    feature = int(np.argmax(run.truth["Safe_1"]["features"][1][1:].max(0)))
    found = call("find", run.path, "--layer", "2", "--feature", feature, "--json")
    use = json.loads(found.stdout)
    assert use["tokens"][0]["activation"] == run.truth["Safe_1"]["features"][1][1:].max()
    shown = call("find", run.path, "--layer", "2", "--feature", feature)
    assert "1 of 2 scenarios are indexed" in shown.stdout
    assert f"»{use['tokens'][0]['token']}«" in shown.stdout.replace("\\n", "\n")
    refused = call("find", run.path, "--layer", "2", "--feature", "0", "--special")
    assert (refused.returncode, "--special'" in refused.stderr) == (2, True)
    assert call("index", run.path, "--special", "--threads", 1).returncode == 3
    first = call("find", run.path, "--layer", "2", "--feature", feature)
    assert "these numbers count special tokens" in first.stdout.replace("\n", " ")
