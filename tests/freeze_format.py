"""Freeze a small run of the current format version under ``tests/data``.

``python tests/freeze_format.py`` refuses to replace what is frozen: stores of a version that has
been released must stay readable for ever. Delete the folder by hand before a version's release.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import fakes
import numpy as np
import zarr

from zarrtrace.format.attributes import FORMAT_VERSION

DATA = Path(__file__).parent / "data"


def main() -> None:
    folder = DATA / f"format_v{FORMAT_VERSION}"
    if folder.exists():
        sys.exit(f"{folder} is frozen already")
    folder.mkdir(parents=True)
    with zarr.config.set({"json_indent": None}):  # half the size
        run = fakes.make_run(folder, layers=(1, 2, 5), features=12, tokens=(5, 4), seed=3)
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez_compressed(file, **_flat(run.truth))  # type: ignore[arg-type]
        (folder / "expected.npz").write_bytes(Path(file.name).read_bytes())
    attributes = {
        "/".join(("run", *node)): json.loads((run.path.joinpath(*node) / "zarr.json").read_text())[
            "attributes"
        ][NAMESPACE]
        for node in ((), *((scenario,) for scenario in run.truth))
    }
    (folder / "expected_attributes.json").write_text(
        json.dumps(attributes, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


def _flat(truth: dict[str, fakes.Truth]) -> dict[str, np.ndarray]:
    """Arrays by ``scenario/array``; text as fixed-width Unicode, so that no pickle is needed."""
    return {
        f"{scenario}/{name}": value.astype(str) if value.dtype == object else value
        for scenario, arrays in truth.items()
        for name, value in arrays.items()
    }


if __name__ == "__main__":
    main()
