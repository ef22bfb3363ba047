"""The loaders: pictures as codes with captions for the models, raw pictures for tokenizers and CLIP."""

from tokscale.data.image_loader import ImageLoader, ImageLoaderConfig
from tokscale.data.token_loader import SourceConfig, TokenLoader, TokenLoaderConfig, open_sources

__all__ = ["ImageLoader", "ImageLoaderConfig", "SourceConfig", "TokenLoader", "TokenLoaderConfig", "open_sources"]
