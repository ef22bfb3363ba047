"""Parti: an encoder reads the caption, a causal decoder writes the image's codes and attends to it."""

from tokscale.models.parti.config import PartiConfig, PartiSampling
from tokscale.models.parti.model import Parti

__all__ = ["Parti", "PartiConfig", "PartiSampling"]
