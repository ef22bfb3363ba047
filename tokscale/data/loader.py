"""The loaders: pictures as codes with captions for the models, raw pictures for tokenizers and CLIP."""

from tokscale.data.token_loader import SourceConfig, TokenLoader, TokenLoaderConfig, open_sources

__all__ = ["SourceConfig", "TokenLoader", "TokenLoaderConfig", "open_sources"]
