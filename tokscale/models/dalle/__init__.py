"""DALL-E: a causal transformer over captions and picture codes."""

from tokscale.models.dalle.config import DALLEConfig, DALLESampling
from tokscale.models.dalle.model import DALLE, GeneratedImages

__all__ = ["DALLE", "DALLEConfig", "DALLESampling", "GeneratedImages"]
