from zarrtrace.index.building import IndexUpdate, build_index
from zarrtrace.index.finding import find_feature
from zarrtrace.index.labels import LabelUpdate, read_labels, write_labels
from zarrtrace.index.names import names_of
from zarrtrace.index.uses import FeatureUse, TokenUse

__all__ = [
    "FeatureUse",
    "IndexUpdate",
    "LabelUpdate",
    "TokenUse",
    "build_index",
    "find_feature",
    "names_of",
    "read_labels",
    "write_labels",
]
