"""Export to, and import from, the documented NPZ layout.

::

    <folder>/
      <scenario>/layer_1.npz ... layer_31.npz    keys 'features' and/or 'attention'
      metadata_L1_31_20251017_120000.json        tokens and key positions of every scenario

A layer without an SAE has no ``features`` in its file, a layer without an attention matrix no
``attention``. Rows of attention that a run does not store are NaN. Files are ordinary NPZ files.
"""

from __future__ import annotations

from zarrtrace.npz.exporting import export_npz
from zarrtrace.npz.importing import import_npz

__all__ = ["export_npz", "import_npz"]
