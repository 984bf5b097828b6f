"""Show what a run holds, as scripts/quickstart does: slices of the store, lazily read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import xarray as xr

import zarrtrace as zt

SCENARIO = "Bankruptcy_90_all_in"


def main(run: Path, exported: Path) -> None:
    """Print attention to the balance, the strongest features and the exported files."""
    ds = zt.open_trace(run / SCENARIO)
    balance = zt.span(ds, "balance")
    print(f'ds = zt.open_trace("{run / SCENARIO}")')
    print(f"balance = zt.span(ds, 'balance')  # tokens {balance}: {texts(ds, balance)}")
    print("ds.attention[:, :, -1, balance].mean(('head', 'key')), by layer:")
    attention = ds.attention[:, :, -1, balance].mean(("head", "key"))
    show(attention.layer.values, attention.values)

    print("\nThe strongest feature of the decision in each layer, whose SAE has its own features:")
    print("ds.top_activation[:, -1, 0] and ds.top_feature[:, -1, 0], by layer:")
    strongest, index = ds.top_activation[:, -1, 0], ds.top_feature[:, -1, 0]
    show(strongest.layer.values, strongest.values, [f"feature {n:<5d} " for n in index.values])

    options = ds.attrs["options"]
    likely = dict(zip(ds.next_token[-1].values, ds.next_token_logprob[-1].values, strict=True))
    choices = [
        f"P({name}) = {np.exp(likely[option['token_id']]):.3f}"
        for name, option in options.items()
        if option["token_id"] in likely
    ]
    print(f"\nThe model's next token: {', '.join(choices)}")

    print(f"\nExported to {exported}:")
    files = sorted((exported / SCENARIO).iterdir(), key=lambda file: int(file.stem[6:]))
    with np.load(files[0], allow_pickle=False) as arrays:
        shapes = ", ".join(f"{key} {arrays[key].shape}" for key in arrays.files)
    print(f"  {SCENARIO}/{files[0].name} ... {files[-1].name}  ({shapes})")
    print(f"  {next(exported.glob('metadata_*.json')).name}")


def texts(ds: xr.Dataset, positions: list[int]) -> str:
    """Join the tokens at some positions."""
    return repr("".join(ds.query_token.values[positions]))


def show(layers: np.ndarray, values: np.ndarray, names: list[str] | None = None) -> None:
    """Print one bar a layer, each with a name if these are given."""
    top = float(np.abs(values).max()) or 1.0
    for layer, value, name in zip(layers, values, names or [""] * len(layers), strict=True):
        print(f"  L{layer:<2d} {value:8.4f}  {name}{'#' * round(40 * abs(float(value)) / top)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
