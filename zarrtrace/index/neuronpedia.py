"""Where Neuronpedia shows the features of a public SAE release."""

from __future__ import annotations

import re

# (release, SAE id) as sae-lens names them -> "<model>/<source>" as Neuronpedia does.
_RULES = (
    (r"llama_scope_lxr_8x", r"l(\d+)r_8x", r"llama3.1-8b/\1-llamascope-res-32k"),
    (r"llama_scope_lxr_32x", r"l(\d+)r_32x", r"llama3.1-8b/\1-llamascope-res-131k"),
    (r"llama_scope_lxm_8x", r"l(\d+)m_8x", r"llama3.1-8b/\1-llamascope-mlp-32k"),
    (r"llama_scope_lxa_8x", r"l(\d+)a_8x", r"llama3.1-8b/\1-llamascope-att-32k"),
    (r"gpt2-small-res-jb", r"blocks\.(\d+)\.hook_resid_pre", r"gpt2-small/\1-res-jb"),
    (
        r"gemma-scope-2b-pt-res-canonical",
        r"layer_(\d+)/width_(16k|65k)/canonical",
        r"gemma-2-2b/\1-gemmascope-res-\2",
    ),
    (
        r"gemma-scope-9b-pt-res-canonical",
        r"layer_(\d+)/width_(16k|131k)/canonical",
        r"gemma-2-9b/\1-gemmascope-res-\2",
    ),
)


def source_of(release: str | None, sae_id: str) -> str | None:
    """Return ``<model>/<source>`` of an SAE on Neuronpedia, or None if it is not known there."""
    for known, pattern, source in _RULES:
        found = re.fullmatch(pattern, sae_id)
        if release == known and found:
            return found.expand(source)
    return None
