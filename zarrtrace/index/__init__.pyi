from zarrtrace.index.building import IndexUpdate, build_index
from zarrtrace.index.finding import find_feature
from zarrtrace.index.uses import FeatureUse, TokenUse

__all__ = ["FeatureUse", "IndexUpdate", "TokenUse", "build_index", "find_feature"]
