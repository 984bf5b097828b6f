"""Import caches of hidden states: NumPy and safetensors files become a table.

::

    hidden_states.npy            (sample, layer, channel)
    layer_{N}.npy                (sample, channel), a file a layer
    layer_{N}.safetensors        one tensor (sample, channel), or residual.layer_{N}
    phase_a_hidden_states.npz    hidden_states (sample, layer, channel), valid_mask, columns

Files are read as numbers and nothing else: no pickle, and no object arrays.
"""

from zarrtrace.imports.hidden import import_hidden, is_hidden

__all__ = ["import_hidden", "is_hidden"]
