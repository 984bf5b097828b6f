"""Files of figures, with model, scenarios and versions in their metadata."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from zarrtrace.analysis.results import provenance
from zarrtrace.analysis.traces import Data
from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import PRINT_DPI, box_of, styled

#: What a page of figures holds, and no other page.
PAGE_MARK = '<meta name="generator" content="zarrtrace figures">'
# What :func:`save` writes into each picture, near the beginning of a PNG, at the end of a PDF.
_MARKS = {
    ".html": PAGE_MARK.encode(),
    ".png": b"Software\0zarrtrace ",
    ".pdf": b"/Creator (zarrtrace ",
}
_PNG_HEAD_BYTES = 2**16


def is_own(file: Path) -> bool:
    """Whether zarrtrace wrote a page or a picture; a link is none, and is not followed."""
    if file.is_symlink() or not file.is_file():
        return False
    try:
        with file.open("rb") as opened:
            head = opened.read(_PNG_HEAD_BYTES if file.suffix == ".png" else -1)
    except OSError:
        return False
    return _MARKS[file.suffix] in head


def metadata_of(data: Data | xr.DataArray) -> dict[str, str]:
    """Return model, SAE release, scenarios and versions of what a figure shows.

    Parameters
    ----------
    data
        A trace, a run, or the result of an analysis.
    """
    if not isinstance(data, xr.DataArray) and "analysis" not in data.attrs:
        found = provenance(data)
        attributes = data.attrs
        names = [attributes["scenario"]] if "scenario" in attributes else attributes["scenarios"]
    else:
        keys = ("analysis", "parameters", "model", "sae_release", "zarrtrace_version")
        found = {key: str(data.attrs[key]) for key in keys if key in data.attrs}
        names = np.atleast_1d(data["scenario"]).tolist() if "scenario" in data.coords else []
    out = {**found, "scenario": ", ".join(map(str, names))}
    out["figures_version"] = importlib.metadata.version("zarrtrace")
    return {key: value for key, value in out.items() if value}


@styled
def save(
    figure: Figure,
    path: str | Path,
    data: Data | xr.DataArray,
    *,
    title: str = "",
    dpi: float = PRINT_DPI,
    box: Bbox | None = None,
) -> Path:
    """Write a figure, with where it comes from in the file's metadata.

    Parameters
    ----------
    figure
        Figure, such as a function of this package returns.
    path
        File to write; its ending, ``.png`` or ``.pdf``, gives the format.
    data
        The trace, run or result that the figure shows.
    title
        Title of the figure, for the metadata.
    dpi
        Dots per inch of a PNG, and of the images within a PDF.
    box
        Part of the figure to write, in inches; if None, all that is drawn on, which takes time to
        measure.

    Returns
    -------
    Path
        `path`. A PNG has text chunks ``Title``, ``Software`` and ``zarrtrace:…`` for model, SAE
        release, scenario and versions; a PDF has the same as JSON in its ``Keywords``. Neither has
        a date: the same data give the same file.

    Raises
    ------
    ConfigError
        If the ending is another one.
    """
    path = Path(path)
    found = metadata_of(data)
    software = f"zarrtrace {found['figures_version']}"
    if path.suffix == ".png":
        metadata: dict[str, str | None] = {
            "Title": title,
            "Software": software,
            **{f"zarrtrace:{key}": value for key, value in found.items()},
        }
        # Level 6, the default, takes four times as long for a tenth of the size.
        options: dict[str, Any] = {"pil_kwargs": {"compress_level": 3}}
    elif path.suffix == ".pdf":
        keywords = json.dumps(found, ensure_ascii=False)
        metadata = {
            "Title": title, "Creator": software, "Subject": found.get("model", ""),
            "Keywords": keywords, "CreationDate": None,
        }  # fmt: skip
        options = {}
    else:
        raise ConfigError(
            f"{path}: cannot write a figure as {path.suffix or 'a file without ending'!r}",
            remedy="Use .png or .pdf.",
        )
    figure.savefig(path, dpi=dpi, metadata=metadata, bbox_inches=box or box_of(figure), **options)
    return path
