"""Exports of a DALL-E and of a CLIP, both as they were initialised, that share a text tokenizer."""

from pathlib import Path

import tiny_pairs
import tiny_pipeline
import torch

from tokscale.base import rng
from tokscale.base.config import decode, encode
from tokscale.checkpoint.export import ExportOptions, write_export
from tokscale.models.clip import CLIP, CLIPConfig
from tokscale.models.dalle import DALLE, DALLEConfig
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer, train_bpe


def make_exports(folder: Path) -> None:
    """Write `dalle`, `clip` and their tokenizers below `folder`."""
    tiny_pipeline.make_image_tokenizer(folder / "image_tokenizer")
    train_bpe(tiny_pipeline.CAPTIONS, 280, folder / "text_tokenizer")
    image, text = load_image_tokenizer(folder / "image_tokenizer"), load_text_tokenizer(folder / "text_tokenizer")
    dalle = decode(DALLEConfig, tiny_pipeline.MODEL).fitted(image, text)
    clip = decode(CLIPConfig, tiny_pairs.MODEL).fitted(image, text)
    words = {"text_tokenizer": folder / "text_tokenizer"}
    for name, model, config, extras in (
        ("dalle", DALLE, dalle, words | {"image_tokenizer": folder / "image_tokenizer"}),
        ("clip", CLIP, clip, words),
    ):
        with rng.scope(0, name):
            state = model(config).state_dict()
        with torch.device("meta"):
            meta = model(config)
        options = ExportOptions(extras=extras)
        write_export(folder / name, meta_model=meta, model_config=encode(config), state_dict=state, options=options)
