"""What training needs, made in a second: two tokenizers and token shards whose codes follow from the captions."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tokscale.base import rng
from tokscale.data.tokens.blocks import ShardWriter, TokenSample, code_dtype, pack
from tokscale.data.tokens.manifest import StreamRecord, write_manifest
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.image import load_image_tokenizer, save_image_tokenizer
from tokscale.tokenizers.text import train_bpe

CAPTIONS = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "green", "blue", "white")]
MODEL = {"kind": "dalle", "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "text_seq_len": 6}


def make_inputs(folder: Path) -> None:
    """Write `image_tokenizer`, `text_tokenizer` and `data/tokens` below `folder`."""
    make_image_tokenizer(folder / "image_tokenizer")
    train_bpe(CAPTIONS, 280, folder / "text_tokenizer")
    make_token_shards(folder / "data" / "tokens", folder / "image_tokenizer")


def make_image_tokenizer(folder: Path, seed: int = 0) -> None:
    config = DiscreteVAEConfig(image_size=8, num_tokens=12, codebook_dim=4, num_layers=1, hidden_dim=4)
    with rng.scope(seed, "tokenizer"):
        save_image_tokenizer(DiscreteVAE(config), folder)


def make_token_shards(
    folder: Path, image_tokenizer: Path, *, labels: bool = False, low: StreamRecord | None = None
) -> None:
    folder.mkdir(parents=True)
    streams = {"codes": StreamRecord.of(load_image_tokenizer(image_tokenizer))}
    streams |= {} if low is None else {"codes.low": low}
    name, rows = "tokens-000000.tar", [_sample(number, labels, streams) for number in range(64)]
    with open(folder / name, "wb") as file:
        writer = ShardWriter(file, {"version": 1})
        for at in range(0, 64, 16):
            writer.add(pack(rows[at : at + 16], dict.fromkeys(streams, code_dtype(12))), 16)
        record = writer.finish(name)
    write_manifest(folder, [record], run="r" * 64, streams=streams, labels=len(CAPTIONS) if labels else None)


def _sample(number: int, labels: bool, streams: Mapping[str, StreamRecord]) -> TokenSample:
    which = number % len(CAPTIONS)
    return TokenSample(
        key=str(number),
        captions=[CAPTIONS[which]],
        codes={name: np.full(stream.code_shape, which) for name, stream in streams.items()},
        source=(0, number),
        size=(8, 8),
        crop=np.zeros(4, np.float32),
        label=which if labels else None,
    )
