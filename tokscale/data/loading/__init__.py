"""The loaders: images as codes with captions for the models, raw images for tokenizers and CLIP."""

from tokscale.data.loading.image_loader import ImageLoader, ImageLoaderConfig
from tokscale.data.loading.token_config import SourceConfig, TokenLoaderConfig, open_sources
from tokscale.data.loading.token_loader import TokenLoader

__all__ = ["ImageLoader", "ImageLoaderConfig", "SourceConfig", "TokenLoader", "TokenLoaderConfig", "open_sources"]
