"""From a configuration to its quantizer."""

from typing import assert_never

from tokscale.tokenizers.quantize.base import TrainedQuantizer
from tokscale.tokenizers.quantize.codebook import CodebookQuantizer
from tokscale.tokenizers.quantize.config import FSQConfig, LFQConfig, QuantizerConfig, ResidualConfig, VQConfig
from tokscale.tokenizers.quantize.lookup_free import FiniteScalarQuantizer, LookupFreeQuantizer


def build_quantizer(config: QuantizerConfig) -> TrainedQuantizer:
    """The quantizer of a configuration."""
    match config:
        case VQConfig() | ResidualConfig():
            return CodebookQuantizer(config)
        case LFQConfig():
            return LookupFreeQuantizer(config)
        case FSQConfig():
            return FiniteScalarQuantizer(config)
        case _:
            assert_never(config)
