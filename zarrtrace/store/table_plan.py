"""Arrays, attributes and coordinates that the plan of a table asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from zarrtrace.errors import ConfigError
from zarrtrace.format.layout import INDEX, NEXT_TOKEN, ArrayLayout
from zarrtrace.format.shared_saes import share_saes
from zarrtrace.format.table_layout import TableAttributes, table_layout
from zarrtrace.records import TablePlan


def arrays_of(plan: TablePlan, layouts: Mapping[str, ArrayLayout]) -> list[tuple[str, int | None]]:
    """Return the arrays that are written block by block, with the layers that they have."""
    attributes = plan.attributes
    variables = {(sae.variable, sae.layer) for sae in plan.saes}
    found: list[tuple[str, int | None]] = []
    for name, layout in layouts.items():
        if name in NEXT_TOKEN:
            found.append((name, None))
        elif layout.has_layers:
            without = attributes.layers_without_sae
            if name == "residual":
                without = attributes.layers_without_residual
            found += [
                (name, layer)
                for layer in attributes.layers
                if layer not in without
                and (name == "residual" or not variables or (name, layer) in variables)
            ]
    return found


def described(
    plan: TablePlan,
) -> tuple[TableAttributes, dict[str, ArrayLayout], dict[str, np.ndarray]]:
    """Return attributes, layouts, and the values of coordinates.

    Raises
    ------
    ConfigError
        If they contradict each other.
    """
    shape = plan.shape
    update: dict[str, Any] = {"config": dict(plan.config), "seal": None, "failed": {}}
    shared, by_layer = share_saes(plan.saes, plan.attributes.layers)
    if plan.saes:
        update["saes"] = shared
    attributes = TableAttributes.model_validate({**dict(plan.attributes), **update})
    values = {name: _labels(name, found, shape.samples) for name, found in plan.coordinates.items()}
    types = {
        name: "string" if found.dtype == object else found.dtype.name
        for name, found in values.items()
    }
    shape = replace(shape, coordinates=types, sae_fields=tuple(by_layer))
    layouts = table_layout(replace(shape, coordinates={}))
    if taken := sorted(types.keys() & {*layouts, INDEX}):
        raise ConfigError(
            f"a coordinate along sample is called {taken[0]!r}",
            why="The table has another array of that name, or its index of features.",
            remedy="Rename the column of metadata.",
        )
    if not {"scenario", "position"} <= types.keys() or shape.samples < 1:
        raise ConfigError(
            f"a table of {shape.samples} samples with coordinates {', '.join(types) or 'none'}",
            why="Each sample has a scenario and a position.",
            remedy="Give at least one sample, and these coordinates.",
        )
    if shape.layers != len(attributes.layers):
        raise ConfigError(
            f"a table of {shape.layers} layers, and {len(attributes.layers)} are named",
            remedy="Give shape.layers the number of attributes.layers.",
        )
    values |= {name: np.asarray(found, dtype=object) for name, found in by_layer.items()}
    values["layer"] = np.asarray(attributes.layers)
    layouts = table_layout(shape)
    coordinates = {
        name: values[name] if name in values else np.arange(layout.shape[0])
        for name, layout in layouts.items()
        if len(layout.dims) == 1
    }
    return attributes, layouts, coordinates


_LABEL_TYPES = ("bool", "int64", "uint32", "float64")


def _labels(name: str, given: Any, samples: int) -> np.ndarray:
    """Return a coordinate's values in a type that is stored."""
    values = np.asarray(given)
    if values.dtype.kind in "UT":
        values = values.astype(object)
    is_text = values.dtype == object and all(isinstance(one, str) for one in values.flat)
    if values.shape != (samples,) or not (is_text or values.dtype.name in _LABEL_TYPES):
        raise ConfigError(
            f"coordinate {name!r} is {values.dtype} of shape {values.shape}",
            why=f"A table of {samples} samples has one text, bool, int64, uint32 or float64 each.",
            remedy="Convert it; a missing text is empty, a missing number NaN.",
        )
    return values
