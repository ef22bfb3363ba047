"""What training a CLIP needs, made in a second: eight plain images that differ in colour, with their captions."""

from pathlib import Path
from typing import Any

import torch
from einops import repeat

from tokscale.data.raw.images import encode_image
from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.tokenizers.text import train_bpe

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
CAPTIONS = [f"a {shade} {colour} square" for shade in ("bright", "dim") for colour in COLOURS]
MODEL = {
    "kind": "clip",
    "dim_text": 16,
    "dim_image": 16,
    "dim_latent": 8,
    "text_enc_depth": 1,
    "text_seq_len": 6,
    "text_heads": 2,
    "visual_enc_depth": 1,
    "visual_heads": 2,
    "visual_image_size": 8,
    "visual_patch_size": 4,
    "dim_head": 8,
}


def images() -> torch.Tensor:
    """One image for each caption."""
    full = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)
    return repeat(torch.cat([full, full // 2]), "n c -> n c h w", h=8, w=8)


def make_pairs(folder: Path) -> None:
    """Write `data/raw` and `text_tokenizer` below `folder`."""
    records = [
        RawRecord(f"{number}", encode_image(image, "png"), "png", caption)
        for number, (image, caption) in enumerate(zip(images(), CAPTIONS, strict=True))
    ]
    write_shard(folder / "data/raw/00000.tar", records)
    train_bpe(CAPTIONS, 290, folder / "text_tokenizer")


def keys(folder: Path, run_dir: Path) -> dict[str, Any]:
    """What `tokscale train` is told."""
    return {
        "run_dir": str(run_dir),
        "data_dir": str(folder / "data"),
        "text_tokenizer": str(folder / "text_tokenizer"),
        "model": MODEL,
        "optim": {"lr": 1e-2},
        "loop": {"total_steps": 30, "log_every": 1},
        "checkpoint": {"every_steps": 20},
        "batch_size": 8,
    }
