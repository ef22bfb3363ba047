"""Captions to ids: byte-level BPE trained here, any Hugging Face `tokenizer.json`, CLIP's vocabulary."""

from tokscale.tokenizers.text.bpe import train_bpe
from tokscale.tokenizers.text.folder import load_text_tokenizer, save_text_tokenizer
from tokscale.tokenizers.text.tokenizer import SubwordTokenizer, TextTokenizerConfig

__all__ = ["SubwordTokenizer", "TextTokenizerConfig", "load_text_tokenizer", "save_text_tokenizer", "train_bpe"]
