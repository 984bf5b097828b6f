from zarrtrace.figures.contrasts import (
    critical_chart,
    difference_heads,
    difference_map,
    volcano,
)
from zarrtrace.figures.features import feature_timeline, trajectory
from zarrtrace.figures.files import metadata_of, save
from zarrtrace.figures.flow import flow_diagram
from zarrtrace.figures.heatmaps import attention_heads, attention_layers, attention_map
from zarrtrace.figures.integrated import integrated_view
from zarrtrace.figures.labels import token_label
from zarrtrace.figures.layers import bands, locality, pathway_strength
from zarrtrace.figures.page import draw_run

__all__ = [
    "attention_heads",
    "attention_layers",
    "attention_map",
    "bands",
    "critical_chart",
    "difference_heads",
    "difference_map",
    "draw_run",
    "feature_timeline",
    "flow_diagram",
    "integrated_view",
    "locality",
    "metadata_of",
    "pathway_strength",
    "save",
    "token_label",
    "trajectory",
    "volcano",
]
