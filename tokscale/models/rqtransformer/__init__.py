"""RQ-Transformer: images as a grid of places with several codes each, predicted place by place and level by level."""

from tokscale.models.rqtransformer.config import HierarchicalConfig, RQSampling, RQTransformerConfig
from tokscale.models.rqtransformer.model import HierarchicalCausalTransformer, RQTransformer

__all__ = [
    "HierarchicalCausalTransformer",
    "HierarchicalConfig",
    "RQSampling",
    "RQTransformer",
    "RQTransformerConfig",
]
