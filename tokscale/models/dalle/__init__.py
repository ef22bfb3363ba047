"""DALL-E: a causal transformer over captions and image codes."""

from tokscale.models.dalle.config import DALLEConfig, DALLESampling
from tokscale.models.dalle.model import DALLE, GeneratedImages

__all__ = ["DALLE", "DALLEConfig", "DALLESampling", "GeneratedImages"]
