from zarrtrace.analysis.attention import (
    attention_locality,
    attention_to,
)
from zarrtrace.analysis.bands import layer_bands
from zarrtrace.analysis.choice_rates import choices, chose
from zarrtrace.analysis.contrasts import contrast
from zarrtrace.analysis.critical import critical_layers
from zarrtrace.analysis.crossreferences import crossreference
from zarrtrace.analysis.decisions import decision, relate
from zarrtrace.analysis.features import feature_trajectory, of_sae
from zarrtrace.analysis.flow import attention_flow, attention_rollout
from zarrtrace.analysis.linear_directions import directions
from zarrtrace.analysis.pathways import pathway_features
from zarrtrace.analysis.probes import probe
from zarrtrace.analysis.roles import head_roles
from zarrtrace.analysis.specificity import position_specific_features
from zarrtrace.analysis.words import read_table, word_associations

__all__ = [
    "attention_flow",
    "attention_locality",
    "attention_rollout",
    "attention_to",
    "choices",
    "chose",
    "contrast",
    "critical_layers",
    "crossreference",
    "decision",
    "directions",
    "feature_trajectory",
    "head_roles",
    "layer_bands",
    "of_sae",
    "pathway_features",
    "position_specific_features",
    "probe",
    "read_table",
    "relate",
    "word_associations",
]
