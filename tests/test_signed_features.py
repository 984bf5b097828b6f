"""Features that fire in both directions (AbsTopK): the strongest are those of largest magnitude."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import synthetic
import xarray as xr

from zarrtrace.analysis import (
    crossreference,
    feature_trajectory,
    pathway_features,
    position_specific_features,
    word_associations,
)
from zarrtrace.npz.importing import with_strongest

_SIGNED = ("features", "top_activation")


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    return synthetic.random_run()


@pytest.fixture(scope="module")
def negated(run: xr.DataTree) -> xr.DataTree:
    """The same run with every activation negated."""
    return xr.DataTree.from_dict(
        {
            "/": run.to_dataset(),
            **{
                name: child.to_dataset().assign({of: -child[of] for of in _SIGNED})
                for name, child in run.children.items()
            },
        }
    )


def _equal(found: xr.Dataset, expected: xr.Dataset, *negative: str) -> None:
    """Compare all arrays; some of them must have the other sign."""
    assert list(found.data_vars) == list(expected.data_vars)
    for name in expected.data_vars:
        sign = -1 if name in negative else 1
        np.testing.assert_array_equal(found[name], sign * expected[name], err_msg=str(name))


def test_words(run: xr.DataTree, negated: xr.DataTree) -> None:
    expected = word_associations(run)
    assert expected.sizes["row"]
    found = word_associations(negated)
    _equal(found, expected, "max_activation")
    assert (found["max_activation"] < 0).all()
    assert found["word"].values.tolist() == expected["word"].values.tolist()


def test_words_of_a_feature_that_changes_its_sign() -> None:
    """A word at which it is -3 and +1 has strength 2, and -3 at the most."""
    ds = synthetic.trace("S", layers=(1,), tokens=4, features=2)
    activations = np.zeros((1, 4, 2), np.float32)
    activations[0, 1:3, 1] = -3, 1
    top = with_strongest(activations[0])
    ds["features"].values[:] = activations
    ds["top_feature"].values[0] = top.top_feature
    ds["top_activation"].values[0] = top.top_activation
    ds = ds.assign_coords(query_token=("query", ["a", "b", "b", "c"]))
    (row,) = word_associations(ds).to_dataframe().to_dict("records")
    assert (row["feature"], row["word"], row["count"]) == (1, "b", 2)
    assert (row["score"], row["max_activation"]) == (2, -3)


def test_pathways(run: xr.DataTree, negated: xr.DataTree) -> None:
    expected = pathway_features(run, "balance", top=4)
    found = pathway_features(negated, "balance", top=4)
    assert (expected["feature"] >= 0).any()
    _equal(found, expected, "score", "source_activation", "target_activation")


def test_features_of_positions(run: xr.DataTree, negated: xr.DataTree) -> None:
    for threshold in (0.0, 0.5):
        expected = position_specific_features(run, threshold=threshold)
        assert (expected["feature"] >= 0).any()
        _equal(position_specific_features(negated, threshold=threshold), expected)


def test_crossreference(run: xr.DataTree, negated: xr.DataTree) -> None:
    table = word_associations(run)
    word = str(table["word"].values[0])
    pairs = {word: "balance"}
    expected = crossreference(run, table, pairs, n_permutations=19)
    assert expected["n_features"].sum() > 0
    _equal(crossreference(negated, table, pairs, n_permutations=19), expected)


@pytest.mark.parametrize("reduce", ["mean", "max", "none"])
def test_trajectories(run: xr.DataTree, negated: xr.DataTree, reduce: str) -> None:
    features = [(1, 0), (2, 3), (3, 5)]
    expected = feature_trajectory(run, features, at="balance", reduce=reduce)
    found = feature_trajectory(negated, features, at="balance", reduce=reduce)
    np.testing.assert_array_equal(found, -expected)
    assert (found < 0).any()


def test_an_imported_index_is_by_magnitude() -> None:
    activations = np.zeros((3, 50), np.float32)
    activations[0, [4, 9, 20]] = 2, -5, 1
    activations[1, 7] = -1
    found = with_strongest(activations)
    assert found.top_feature[0, :3].tolist() == [9, 4, 20]
    assert found.top_activation[0, :4].tolist() == [-5, 2, 1, 0]
    assert (found.top_feature[1, 0], found.top_activation[1, 0]) == (7, -1)
    assert not found.top_activation[2].any()


def test_figures_have_colours_for_both_signs(run: xr.DataTree, negated: xr.DataTree) -> None:
    pytest.importorskip("matplotlib")
    from zarrtrace.figures import feature_timeline

    name = next(iter(run.children))
    for ds, low in ((run[name].to_dataset(), 0), (negated[name].to_dataset(), -1)):
        for feature in (None, (1, 3)):
            (image,) = feature_timeline(ds, feature).axes[0].images
            assert np.sign(image.norm.vmin) == low
            assert image.norm.vmax > 0
            assert (image.cmap.name == "RdBu_r") == (low < 0)


@pytest.mark.torch
def test_capture_and_index_of_an_abstopk_sae(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from sae_lens import SAE, AbsTopKSAEConfig

    from zarrtrace import demo
    from zarrtrace.extraction import Options, extract_run
    from zarrtrace.index import build_index, find_feature
    from zarrtrace.store import open_trace

    config = AbsTopKSAEConfig(d_in=64, d_sae=96, k=40)
    config.metadata.hook_name = "blocks.2.hook_resid_post"
    sae = SAE.from_dict(config.to_dict())
    generator = torch.Generator().manual_seed(0)
    sae.W_enc.data = torch.randn(sae.W_enc.shape, generator=generator)
    sae.save_model(tmp_path / "saes")
    assert demo.model_path().is_dir()
    options = Options(sae_path=tmp_path / "saes", layers=(2,), attention=False, only=("Risky_40",))
    run = extract_run(tmp_path / "run", options)
    ds = open_trace(run / "Risky_40").load()
    dense = ds.features.values[0]
    assert (dense < 0).any()
    assert ((dense != 0).sum(1) == 40).all()
    order = np.argsort(-np.abs(dense), axis=1, kind="stable")[:, :32]
    np.testing.assert_array_equal(ds.top_feature[0], order)
    np.testing.assert_array_equal(ds.top_activation[0], np.take_along_axis(dense, order, 1))
    build_index(run, special=True)
    feature = int(np.argmin(dense.min(0)))
    found = find_feature(run, 2, feature, top=3, special=True)
    best = np.argsort(-np.abs(dense[:, feature]), kind="stable")[:3]
    assert [one.position for one in found.tokens] == best.tolist()
    assert [one.activation for one in found.tokens] == dense[best, feature].tolist()
    assert found.maximum == dense[best[0], feature] < 0
    assert found.frequency == np.float32((dense[:, feature] != 0).mean())
    assert found.mean == pytest.approx(dense[:, feature].astype(np.float64).mean(), rel=2**-22)
