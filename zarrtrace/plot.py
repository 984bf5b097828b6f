"""Quick looks at attention, for notebooks: like ``.plot()``, with token texts, queries downwards.

Unlike :mod:`zarrtrace.figures`, which draws for papers, this draws into pyplot's figures, which
notebooks show by themselves.

>>> import zarrtrace as zt
>>> ds = zt.open_trace("runs/demo/Risky_40")
>>> zt.plot.attention(ds, layer=25, head=2)
>>> zt.plot.attention(ds.attention.sel(layer=25, head=2).isel(query=slice(-20, None)))
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import NOT_STORED, PROMPT_END, SEQUENTIAL, size_of
from zarrtrace.figures.labels import drawable, label_tokens, token_label

_SIDE = 6.0  # inches
_POINTS = 7  # size of the tokens' texts


def attention(
    data: xr.Dataset | xr.DataArray,
    *,
    layer: int | None = None,
    head: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw attention with its tokens: queries downwards, keys to the right.

    Parameters
    ----------
    data
        A trace, or its ``attention`` or ``attention_mean``, of which layers, heads, queries and
        keys may be selected. A single query is drawn as a bar for each key.
    layer
        The decoder block, where the data have several.
    head
        The query head; the mean over heads if None.
    ax
        Where to draw; a new figure of pyplot's if None.

    Returns
    -------
    Axes
        Rows and columns count from 0, whichever tokens were selected; their labels are the texts.
        A row that is not stored is grey. The scale is the square root of a weight, from 0 to the
        largest.

    Raises
    ------
    ConfigError
        If the data are no attention, or have no such layer or head.
    """
    weights = _weights(data, layer, head)
    title = _title(weights, data, head)
    keys = _texts(weights, "key")
    single = weights.ndim == 1
    if ax is None:
        size = (_SIDE * 1.2, _SIDE / 2) if single else (_SIDE * 1.2, _SIDE)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    width, height = size_of(ax)
    if single:
        ax.bar(range(len(keys)), np.asarray(weights), width=0.9)
        ax.set_xlim(-0.6, len(keys) - 0.4)
        ax.set_ylabel("attention weight")
    else:
        values = np.asarray(weights, dtype=np.float64)
        largest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
        colours = plt.get_cmap(SEQUENTIAL).with_extremes(bad=NOT_STORED)
        image = ax.imshow(
            np.ma.masked_invalid(values), cmap=colours, aspect="auto", origin="upper",
            interpolation="nearest", norm=PowerNorm(0.5, vmin=0, vmax=largest or 1.0),
        )  # fmt: skip
        label_tokens(ax.yaxis, _texts(weights, "query"), inches=height, size=_POINTS)
        ax.set_ylabel("query (attends)")
        ax.figure.colorbar(image, ax=ax, label="attention weight")
    _mark_prompt_end(ax, weights)
    strongest = np.argsort(-np.asarray(weights))[:8].tolist() if single else []
    label_tokens(ax.xaxis, keys, inches=width, keep=strongest, size=_POINTS, rotation=90)
    ax.set_xlabel("key (attended to)")
    ax.set_title(title, parse_math=False, fontsize="medium")
    return ax


def _mark_prompt_end(ax: Axes, weights: xr.DataArray) -> None:
    """Draw a line before the first key, and the first query, that the model generated."""
    if "generated" not in weights.coords:
        return
    generated = weights["generated"]
    keys = np.atleast_1d(generated)
    if keys.any() and not keys.all():
        ax.axvline(int(keys.argmax()) - 0.5, color=PROMPT_END, lw=1)
    if weights.ndim == 1:
        return
    first = int(np.asarray(weights["key"])[keys].min()) if keys.any() else None
    queries = np.asarray(weights["query"])
    if first is not None and queries[0] < first <= queries[-1]:
        ax.axhline(int(np.searchsorted(queries, first)) - 0.5, color=PROMPT_END, lw=1)


def _weights(data: xr.Dataset | xr.DataArray, layer: int | None, head: int | None) -> xr.DataArray:
    """Return ``(query, key)`` or ``(key)``."""
    if isinstance(data, xr.Dataset):
        name = "attention_mean" if head is None and "attention_mean" in data else "attention"
        if name not in data:
            raise ConfigError(
                "the dataset has no attention",
                why="It is not a trace, or was extracted with --no-attention.",
                remedy=f"It has: {', '.join(map(str, data.data_vars)) or 'nothing'}.",
            )
        data = data[name]
    data = data.rename({dim: new for dim, new in _OWN_DIMENSIONS.items() if dim in data.dims})
    data = _select(data, "layer", layer)
    if head is not None or "head" not in data.dims:
        data = _select(data, "head", head)
    else:
        data = data.mean("head", keep_attrs=True)
    if set(data.dims) not in ({"query", "key"}, {"key"}):
        raise ConfigError(
            f"cannot draw an array over ({', '.join(map(str, data.dims))})",
            why="Attention is drawn over query and key, or of one query over key.",
            remedy="Give ds, ds.attention or ds.attention_mean, or a selection of them.",
        )
    return data.transpose(..., "key")


#: Attention of some layers or queries only has dimensions of its own.
_OWN_DIMENSIONS = {"attention_layer": "layer", "attention_query": "query"}


def _select(data: xr.DataArray, dim: str, wanted: int | None) -> xr.DataArray:
    """Return the data at one layer or head, which they may be at already."""
    there = np.atleast_1d(data[dim]).tolist() if dim in data.coords else []
    if wanted is None and len(there) > 1:
        raise ConfigError(
            f"the data have several {dim}s", remedy=f"Give {dim}=…, one of {_listed(there)}."
        )
    if wanted is not None and wanted not in there:
        raise ConfigError(
            f"the data have no {dim} {wanted}", remedy=f"They have {_listed(there) or 'none'}."
        )
    if dim not in data.dims:
        return data
    return data.isel({dim: 0 if wanted is None else there.index(wanted)})


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _texts(weights: xr.DataArray, dim: str) -> list[str]:
    """Return the texts of the tokens along a dimension; their positions if there are none."""
    found = weights.coords.get(f"{dim}_token", weights[dim])
    return [str(text) for text in np.atleast_1d(found)]


def _title(weights: xr.DataArray, data: xr.Dataset | xr.DataArray, head: int | None) -> str:
    """Say what is drawn, where that is one thing."""
    parts = [drawable(str(data.attrs["scenario"]))] if "scenario" in data.attrs else []
    if "layer" in weights.coords:
        parts.append(f"layer {int(weights['layer'])}")
    if "head" in weights.coords:
        parts.append(f"head {int(weights['head'])}")
    elif head is None:
        parts.append("mean over heads")
    if weights.ndim == 1 and "query" in weights.coords:
        token = (
            f" {token_label(_texts(weights, 'query')[0])}"
            if "query_token" in weights.coords
            else ""
        )
        parts.append(f"query {int(weights['query'])}{token}")
    return ", ".join(parts)
