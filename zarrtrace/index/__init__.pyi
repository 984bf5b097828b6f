from zarrtrace.index.building import IndexUpdate, build_index
from zarrtrace.index.finding import FeatureUse, TokenUse, find_feature

__all__ = ["FeatureUse", "IndexUpdate", "TokenUse", "build_index", "find_feature"]
