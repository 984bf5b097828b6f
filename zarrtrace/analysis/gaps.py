"""Layers that a store lacks, and layers in which a model computed NaN or infinity.

Both read as NaN. The store's attributes tell them apart: a value never does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from zarrtrace.format.attributes import layers_in, ranges, sae_coordinate

#: Attributes of a result that say why values are NaN.
GAPS = ("missing", "nonfinite")

# Scenarios that a sentence names.
_NAMED = 3


def missing_layers(ds: xr.Dataset, name: str = "features") -> frozenset[int]:
    """Return the layers of a trace whose values of an array are not stored.

    Parameters
    ----------
    ds
        A trace.
    name
        An array. For arrays of features, layers without an SAE are missing, too.
    """
    found = frozenset(layers_in(ds.attrs.get("missing_layers", "")))
    return found | layers_without_sae(ds, name) if name.startswith("features") else found


def layers_without_sae(ds: xr.Dataset, name: str = "features") -> frozenset[int]:
    """Return the layers of a trace or a table in which an array of features has no SAE.

    The attribute ``layers_without_sae`` names those that no array has; of several arrays, each
    lacks others, too.
    """
    found = {*layers_in(ds.attrs.get("layers_without_sae", ""))}
    ids = sae_coordinate("id", name)
    if ids in ds.coords and ds[ids].dims == ("layer",) and "layer" in ds.indexes:
        layers, texts = ds.indexes["layer"].tolist(), np.asarray(ds[ids]).tolist()
        found |= {layer for layer, text in zip(layers, texts, strict=True) if not text}
    return frozenset(found)


def sae_ids(runs: Sequence[xr.Dataset], layers: Sequence[int]) -> dict[Hashable, xr.Variable]:
    """Return the coordinates of a table of traces that say which layers each of several SAEs has.

    With a single one, the attribute ``layers_without_sae`` says it, and nothing is read.
    """
    arrays = [str(name) for name in runs[0].data_vars if str(name).split("_")[0] == "features"]
    if len(arrays) < 2 or not layers:
        return {}
    found: dict[str, dict[int, str]] = {sae_coordinate("id", array): {} for array in arrays}
    seen: set[int] = set()
    for ds in runs:
        own = ds.indexes["layer"].tolist()
        if not seen >= {*own}:  # traces of a run have the same SAEs on the same layers
            for name in found.keys() & ds.coords.keys():
                found[name] |= zip(own, np.asarray(ds[name]).tolist(), strict=True)
            seen |= {*own}
    return {
        name: xr.Variable("layer", np.array([texts.get(n, "") for n in layers], object))
        for name, texts in found.items()
        if texts
    }


def missing_of_table(table: xr.Dataset) -> dict[str, frozenset[int]]:
    """Return the layers whose features are not stored, by scenario of a table.

    The name ``""`` stands for scenarios without gaps of their own.
    """
    everywhere = layers_without_sae(table)
    own = table.attrs.get("missing_layers", {})
    failed = dict.fromkeys(table.attrs.get("failed", {}), table.indexes.get("layer", []))
    found = {name: frozenset(layers_in(text)) for name, text in own.items()}
    found |= {name: frozenset(map(int, layers)) for name, layers in failed.items()}
    return {name: layers | everywhere for name, layers in {"": frozenset(), **found}.items()}


def gaps_of_traces(runs: Mapping[str, xr.Dataset], layers: Iterable[int]) -> dict[str, Any]:
    """Return the attributes of a table of traces that say which values are NaN, and why.

    Parameters
    ----------
    runs
        The traces by scenario.
    layers
        Layers of the table.
    """
    no_sae = "layers_without_sae"
    without = {name: {*layers_in(ds.attrs.get(no_sae, ""))} for name, ds in runs.items()}
    common = set.intersection(*without.values())
    missing, nonfinite = {}, {}
    for name, ds in runs.items():
        stored = set(ds.indexes["layer"].tolist()) if "layer" in ds.indexes else set()
        gone = (set(layers) - stored) | missing_layers(ds, "") | (without[name] - common)
        if gone:
            missing[name] = ranges(sorted(gone))
        if ds.attrs.get("nonfinite"):
            nonfinite[name] = ds.attrs["nonfinite"]
    found = {"missing_layers": missing, "nonfinite": nonfinite}
    return {
        no_sae: ranges(sorted(common)),
        **{key: value for key, value in found.items() if value},
    }


# --- sentences ---------------------------------------------------------------------------------


def statements(found: Iterable[tuple[str, Mapping[Any, Any]]]) -> dict[str, str]:
    """Return sentences on values that are missing, and on those that were computed as NaN.

    Parameters
    ----------
    found
        Scenarios and the attributes of their traces.

    Returns
    -------
    dict
        ``"missing"`` and ``"nonfinite"``, those that apply.
    """
    missing: dict[str, list[str]] = {}
    computed: dict[str, list[str]] = {}
    for scenario, attributes in found:
        if attributes.get("failed"):
            missing.setdefault("all", []).append(scenario)
        elif layers := attributes.get("missing_layers"):
            missing.setdefault(_layers(layers), []).append(scenario)
        for array, layers in (attributes.get("nonfinite") or {}).items():
            where = f"{array} of {_layers(layers)}" if layers else array
            computed.setdefault(where, []).append(scenario)
    out = {}
    if missing:
        out["missing"] = f"Not stored, and left out: {_listed(missing)}."
    if computed:
        out["nonfinite"] = (
            f"The model computed NaN or infinity: {_listed(computed)}. Results that depend on "
            "these values are NaN, or leave them out."
        )
    return out


def attributes_by_scenario(table: xr.Dataset) -> Iterable[tuple[str, Mapping[Any, Any]]]:
    """Yield the scenarios of a table that have gaps, with attributes as a trace has them."""
    attributes = table.attrs
    by_name = {
        name: dict.fromkeys(attributes.get(name) or {})
        for name in ("failed", "missing_layers", "nonfinite")
    }
    for scenario in dict.fromkeys(one for names in by_name.values() for one in names):
        yield (
            scenario,
            {
                name: attributes[name][scenario]
                for name, names in by_name.items()
                if scenario in names
            },
        )


def _layers(text: str) -> str:
    return f"layer {text}" if text.isdecimal() else f"layers {text}"


def _listed(groups: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{of} in {_some(names)}" for of, names in groups.items())


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more scenarios" if rest > 0 else "")
