"""The embedded demo: a small Llama, one SAE per block, ten slot-machine scenarios, two tutorials.

`scripts/train_demo.py` made the weights; `README.md` beside them is the model card.
"""

import shutil
from pathlib import Path

from zarrtrace import store
from zarrtrace.errors import UsageError

_FOLDER = Path(__file__).parent

#: The layers of the slot-machine experiment, L1 to L31, which a run of the demo captures.
LAYERS = tuple(range(1, 32))


def model_path() -> Path:
    """Folder of the embedded model and its tokenizer, in Hugging Face's layout."""
    return _FOLDER / "model"


def sae_path() -> Path:
    """Folder that holds one sae-lens SAE folder per block, ``blocks.{N}.hook_resid_post``."""
    return _FOLDER / "saes"


def suite_path() -> Path:
    """The YAML file of the ten slot-machine scenarios."""
    return _FOLDER / "slot_machine.yaml"


def tutorial_paths() -> list[Path]:
    """Return the tutorials' notebooks, in the order in which to read them."""
    return [_FOLDER / f"tutorial_{name}.ipynb" for name in ("finding", "samples")]


def copy_tutorials(folder: str | Path) -> list[Path]:
    """Copy the tutorials' notebooks to a folder.

    Parameters
    ----------
    folder
        Made if it is not there.

    Returns
    -------
    list of Path
        The copies.

    Raises
    ------
    UsageError
        A file of that name is there, or the folder is in a run; then nothing is copied.
    """
    store.refuse_inside(folder)
    copies = {source: Path(folder) / source.name for source in tutorial_paths()}
    for copy in copies.values():
        if copy.exists() or copy.is_symlink():
            raise UsageError(
                f"{copy} is there already",
                why="It may hold your changes, and nothing was copied.",
                remedy="Move it away, or name another folder: zarrtrace tutorial -o FOLDER.",
            )
    Path(folder).mkdir(parents=True, exist_ok=True)
    for source, copy in copies.items():
        shutil.copyfile(source, copy)
    return list(copies.values())
