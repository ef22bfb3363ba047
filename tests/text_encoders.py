"""Folders of tiny, randomly initialised text encoders, as the transformers library writes them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tokscale.base import rng

WORDS = ["a", "small", "large", "red", "green", "blue", "white", "circle", "cat", "on", "the", "mat"]


def save_t5(folder: Path, *, width: int = 16, seed: int = 0, whole: bool = False) -> Path:
    """T5 v1.1: gated GELU, relative positions; `whole` with the decoder that nothing here reads."""
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32,
        d_model=width,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with rng.scope(seed, "t5"):
        model = (T5ForConditionalGeneration if whole else T5EncoderModel)(config)
    with torch.no_grad(), rng.scope(seed, "t5 weights"):
        for parameter in model.parameters():  # the library's own start leaves the states almost equal
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    words = _words(["<pad>", "</s>", "<unk>"])
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    _save(folder, words, "PreTrainedTokenizerFast", pad="<pad>", eos="</s>")
    return folder


def save_clip(folder: Path, *, width: int = 16, positions: int = 7, whole: bool = False) -> Path:
    """CLIP's causal text tower, or with `whole` both towers."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

    text = {
        "vocab_size": 32,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = text | {"image_size": 8, "patch_size": 4}
    with rng.scope(0, "clip"):
        if whole:
            model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        else:
            model = CLIPTextModel(CLIPTextConfig(**text))
    model.save_pretrained(folder)
    words = _words(["<start>", "<end>", "<unk>"])
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    _save(folder, words, "PreTrainedTokenizerFast", pad="<end>", eos="<end>")
    return folder


def _words(special: list[str]) -> Tokenizer:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    words.add_special_tokens(special)
    return words


def _save(folder: Path, words: Tokenizer, kind: str, *, pad: str, eos: str) -> None:
    import transformers

    getattr(transformers, kind)(tokenizer_object=words, pad_token=pad, eos_token=eos).save_pretrained(folder)
