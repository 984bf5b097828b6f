"""The embedded demo: a small Llama, one SAE per block, and the ten slot-machine scenarios.

`scripts/train_demo.py` made the weights; `README.md` beside them is the model card.
"""

from pathlib import Path

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
