"""CLIP: captions and images in one space."""

from tokscale.models.clip.config import CLIPConfig
from tokscale.models.clip.model import CLIP

__all__ = ["CLIP", "CLIPConfig"]
