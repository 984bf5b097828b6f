"""Looking one feature up in a table, whose chunks are an index by themselves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.gaps import layers_without_sae
from zarrtrace.errors import ConfigError
from zarrtrace.format.layout import SPECIAL
from zarrtrace.index.labels import label_of
from zarrtrace.index.uses import AFTER, BEFORE, FeatureUse, Text, TokenUse, no_values
from zarrtrace.scenarios import first_repeats, sample_names
from zarrtrace.storage import Location
from zarrtrace.store import open_table
from zarrtrace.suggestions import did_you_mean


def find_in_table(
    run: Location,
    layer: int,
    feature: int,
    *,
    top: int,
    array: str,
    special: bool,
    text: Text = "all",
) -> FeatureUse:
    """Say which samples of a table drive a feature: one row of chunks is read.

    Samples that were not computed are left out, prompts of a scenario's further repeats, and
    special tokens unless asked for.

    Raises
    ------
    ConfigError
        If the table has no such array, layer or feature.
    """
    ds = open_table(run)
    values = _values(ds, run, layer, feature, array)
    names, generated = _names(ds), _generated(ds)
    is_known = ~np.isnan(values) & (generated | _of_first_repeats(names))
    if not special and is_known.any():
        is_known &= ~_special(ds)
        if not is_known.any():
            raise ConfigError(
                f"{run}: all samples of the table are special tokens",
                remedy="Ask for them: --special, or special=True.",
            )
    if not is_known.any():
        without = layers_without_sae(ds, array)
        having = [n for n in ds["layer"].to_numpy().tolist() if n not in without]
        raise no_values(run, layer, array, having)
    known = np.where(is_known, values, 0).astype(np.float64)
    order = np.argsort(-np.abs(known), kind="stable")
    listed = np.ones(len(known), bool) if text == "all" else generated == (text == "generated")
    strongest = [int(at) for at in order[listed[order]][:top] if known[at] != 0]
    return FeatureUse(
        layer=layer,
        feature=feature,
        array=array,
        maximum=float(known[order[0]]),
        mean=float(known.sum() / is_known.sum()),
        frequency=float((known != 0).sum() / is_known.sum()),
        tokens=tuple(_uses(ds, known, strongest, names, generated)),
        special=special,
        indexed=int(ds.attrs["scenarios"]) - len(ds.attrs["failed"]),
        scenarios=int(ds.attrs["scenarios"]),
        label=label_of(run, layer, feature, array),
    )


def _special(ds: xr.Dataset) -> np.ndarray:
    """Tell which samples of a table hold special tokens; none if it does not say."""
    if SPECIAL not in ds.coords or SPECIAL in ds.attrs["metadata"]:
        return np.zeros(ds.sizes["sample"], bool)
    return np.asarray(ds[SPECIAL].values, bool)


def _values(ds: xr.Dataset, run: Location, layer: int, feature: int, array: str) -> np.ndarray:
    arrays = [str(name) for name in ds.data_vars if str(name).startswith("features")]
    if array not in arrays:
        raise ConfigError(
            f"{run}: the table has no {array!r}", remedy=did_you_mean(array, arrays, label="It has")
        )
    layers, count = ds["layer"].to_numpy().tolist(), ds[array].shape[-1]
    if layer not in layers or not 0 <= feature < count:
        raise ConfigError(
            f"{run}: the table has no feature {feature} of layer {layer}",
            why=f"It has layers {ds.attrs['layers']} and features 0 to {count - 1}.",
            remedy="Give one of these.",
        )
    return ds[array][layers.index(layer), :, feature].to_numpy()


def _names(ds: xr.Dataset) -> np.ndarray:
    """Return the name of each sample's trace."""
    scenarios = ds["scenario"].to_numpy()
    if "repeat" not in ds.coords:
        return scenarios
    return np.array(sample_names(scenarios, ds["repeat"].to_numpy()), object)


def _generated(ds: xr.Dataset) -> np.ndarray:
    """Tell which samples hold generated tokens."""
    if "generated" not in ds.coords or "generated" in ds.attrs["metadata"]:
        return np.zeros(ds.sizes["sample"], bool)
    return ds["generated"].to_numpy()


def _of_first_repeats(names: np.ndarray) -> np.ndarray:
    """Tell which samples are of the first repeat of their scenario."""
    codes, unique = pd.factorize(names)
    return np.array(first_repeats(unique.tolist()), bool)[codes]


def _uses(
    ds: xr.Dataset,
    values: np.ndarray,
    strongest: list[int],
    scenarios: np.ndarray,
    generated: np.ndarray,
) -> list[TokenUse]:
    """Name samples; the text around them is that of neighbours, if the table holds them."""
    texts, positions = (ds[name].to_numpy() for name in ("token", "position"))

    def text(at: int, places: range) -> str:
        found = ""
        for place in places:
            other = at + place
            is_near = 0 <= other < len(texts) and scenarios[other] == scenarios[at]
            if is_near and positions[other] == positions[at] + place:
                found += str(texts[other])
        return found

    return [
        TokenUse(
            activation=float(values[at]),
            scenario=str(scenarios[at]),
            position=int(positions[at]),
            token=str(texts[at]),
            before=text(at, range(-BEFORE, 0)),
            after=text(at, range(1, AFTER + 1)),
            generated=bool(generated[at]),
        )
        for at in strongest
    ]
