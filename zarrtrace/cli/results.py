"""Results of analyses as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zarrtrace.cli.feature_names import Namer
from zarrtrace.cli.tables import Choice, Layout, rows_of

if TYPE_CHECKING:
    import xarray as xr

_ENDINGS = (".csv", ".parquet", ".nc", ".json")


def check_output(output: Path, choice: Choice) -> None:
    """Refuse a file that cannot be written, before minutes of work."""
    from zarrtrace.store import refuse_inside

    if output.suffix not in _ENDINGS:
        raise click.UsageError(f"--output must end in one of {', '.join(_ENDINGS)}.")
    if output.suffix == ".nc" and choice != Choice():
        raise click.UsageError(
            "--layer, --feature, --sort and --top choose rows; a .nc file has labelled arrays, all "
            "of them. Select in it, or write a .csv, .parquet or .json file."
        )
    if not output.parent.is_dir():
        raise click.UsageError(f"--output {output}: there is no folder {output.parent}.")
    refuse_inside(output)
    if output.is_dir():
        raise click.UsageError(f"--output {output}: is a folder; give a file.")


def write_result(
    result: xr.DataArray | xr.Dataset, output: Path, layout: Layout, choice: Choice, namer: Namer
) -> None:
    """Write a result by the ending of a file.

    All but NetCDF hold a row a combination of labels, sorted as on a terminal. Parquet, NetCDF and
    JSON hold the attributes, and with them the sentence that answers the question; CSV has no
    place for it. Features that `namer` names have their label in ``label``, a column or, in
    NetCDF, a coordinate.
    """
    if output.suffix == ".nc":
        _netcdf(_with_labels(result, namer)).to_netcdf(output, engine="h5netcdf")
        return
    frame = rows_of(result, layout, choice, namer)
    if output.suffix == ".csv":
        frame.to_csv(output, index=False)
    elif output.suffix == ".parquet":
        frame.attrs = {str(name): value for name, value in _netcdf(result).attrs.items()}
        frame.to_parquet(output, index=False)
    else:
        content = {
            "attrs": result.attrs,
            "rows": json.loads(frame.to_json(orient="records", double_precision=15)),
        }
        output.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")


def _with_labels(result: xr.DataArray | xr.Dataset, namer: Namer) -> xr.DataArray | xr.Dataset:
    """Return the result with a coordinate ``label`` if it is about features and one has a label."""
    import numpy as np
    import xarray as xr

    names = {*result.coords, *(result if isinstance(result, xr.Dataset) else ())}
    if not {"layer", "feature"} <= names or "label" in names:
        return result
    pair = (result[name].reset_coords(drop=True) for name in ("layer", "feature"))
    layer, feature = xr.broadcast(*pair)
    pairs = list(zip(layer.values.ravel().tolist(), feature.values.ravel().tolist(), strict=True))
    if not (found := namer(pairs, False)):  # noqa: FBT003
        return result
    texts = np.array([found.get(pair, "") for pair in pairs], dtype=object).reshape(layer.shape)
    attrs = {"long_name": "label of the feature in the run's labels; empty if it has none"}
    return result.assign_coords(label=(layer.dims, texts, attrs))


def _netcdf(result: xr.DataArray | xr.Dataset) -> xr.DataArray | xr.Dataset:
    """Return the result with attributes that NetCDF can hold: text and numbers."""
    out = result.copy()
    out.attrs = {
        name: value if isinstance(value, str | int | float) else json.dumps(value, default=str)
        for name, value in result.attrs.items()
        if value is not None
    }
    return out
