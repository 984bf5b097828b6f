"""A run is read by zarrita.js under Node: what it reads is what NumPy wrote."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import fakes
import node_packages
import numpy as np
import pytest

import zarrtrace as zt
from zarrtrace.format.layout import Limits
from zarrtrace.index import build_index

HERE = Path(__file__).parent
ARRAYS = (
    "attention",
    "attention_mean",
    "features",
    "key_token",
    "layer",
    "next_token_logprob",
    "next_token_text",
    "query_token",
    "special",
    "token_id",
    "top_activation",
    "top_feature",
)


@pytest.mark.long
def test_zarrita_reads_what_numpy_wrote(tmp_path: Path) -> None:
    node_packages.install()
    # The second is long enough for several chunks a layer, the third for several files an array;
    # layer 2 has no SAE, so that its chunks of features are absent.
    run = fakes.make_run(
        tmp_path,
        scenarios=("Safe_1", "Risky_2", "Safe_3"),
        tokens=(7, 300, 40),
        layers=(1, 2, 3),
        features=16,
        without_sae=(2,),
        limits=Limits(file_bytes=40_000),
    )
    build_index(run.path, special=True)
    paths = [f"{scenario}/{name}" for scenario in run.truth for name in ARRAYS]
    of_index = ["index/scenario", "index/maximum", "index/token_activation", "index/active"]
    done = subprocess.run(
        ["node", HERE / "read_run.mjs", run.path, *paths, *of_index],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.stderr
    found = json.loads(done.stdout)
    assert found["scenarios"] == list(run.truth)
    for scenario, truth in run.truth.items():
        for name in ARRAYS:
            read = found["arrays"][f"{scenario}/{name}"]
            values = np.array(read["values"], dtype=truth[name].dtype).reshape(read["shape"])
            np.testing.assert_array_equal(values, truth[name])
        assert found["arrays"][f"{scenario}/attention"]["dims"] == ["layer", "head", "query", "key"]
    assert found["arrays"]["index/scenario"]["values"] == list(run.truth)
    every = np.concatenate([truth["features"][[0, 2]] for truth in run.truth.values()], axis=1)
    strongest = -np.sort(-every, axis=1)[:, :20].swapaxes(1, 2)
    for name, values in (
        ("maximum", every.max(1)),
        ("token_activation", strongest),
        ("active", (every > 0).sum(1)),
    ):
        read = found["arrays"][f"index/{name}"]
        np.testing.assert_array_equal(np.reshape(read["values"], read["shape"]), values)


@pytest.mark.torch
def test_example_of_the_documents(demo_run: Path, tmp_path: Path) -> None:
    node_packages.install()
    (tmp_path / "node_modules").symlink_to(HERE / "node_modules")
    document = HERE.parent / "zarrtrace" / "store" / "README.md"
    (example,) = re.findall(r"^```js\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S)
    (tmp_path / "example.mjs").write_text(example, encoding="utf-8")
    done = subprocess.run(
        ["node", tmp_path / "example.mjs"],
        cwd=demo_run.parent.parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.stderr
    stored = zt.open_trace(demo_run / "Risky_40").attention[19, 2, 100, 52]
    assert np.float32(done.stdout) == stored.item() > 0
