"""Captions to ids (BPE trained here, any `tokenizer.json`, CLIP's vocabulary), or to a frozen model's states."""

from tokscale.tokenizers.text.bpe import train_bpe
from tokscale.tokenizers.text.encoder import FrozenTextEncoder, load_text_encoder
from tokscale.tokenizers.text.folder import load_text_tokenizer, save_text_tokenizer
from tokscale.tokenizers.text.tokenizer import SubwordTokenizer, TextTokenizerConfig

__all__ = [
    "FrozenTextEncoder",
    "SubwordTokenizer",
    "TextTokenizerConfig",
    "load_text_encoder",
    "load_text_tokenizer",
    "save_text_tokenizer",
    "train_bpe",
]
