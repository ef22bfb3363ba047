"""Images of three shapes as token shards of three buckets, made in a second."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import tiny_pipeline
from PIL import Image

from tokscale.base.config import decode
from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.dist.env import ProcessEnv
from tokscale.stages import tokenize
from tokscale.tokenizers.text import train_bpe

BUCKETS = ("8x8", "12x8", "8x16")
SHAPES = ((9, 9), (10, 15), (17, 8))
"""Rows and columns of images, one shape for each bucket."""
GRIDS = {"8x8": (4, 4), "12x8": (4, 6), "8x16": (8, 4)}


def make_pipeline(folder: Path, counts: tuple[int, int, int] = (20, 20, 20)) -> None:
    """Write `image_tokenizer`, `text_tokenizer` and `data/raw` below `folder`: so many images of each shape."""
    tiny_pipeline.make_image_tokenizer(folder / "image_tokenizer")
    train_bpe(tiny_pipeline.CAPTIONS, 280, folder / "text_tokenizer")
    write_raw(folder / "data" / "raw", counts)


def write_raw(folder: Path, counts: tuple[int, int, int], seed: int = 0) -> None:
    """Raw shards of noise."""
    values, records = np.random.default_rng(seed), []
    turns = [shape for number in range(max(counts)) for shape, count in enumerate(counts) if number < count]
    for number, shape in enumerate(turns):
        stream = io.BytesIO()
        Image.fromarray(values.integers(0, 256, (*SHAPES[shape], 3)).astype(np.uint8)).save(stream, "PNG")
        records.append(RawRecord(f"{number:06d}", stream.getvalue(), "png", tiny_pipeline.CAPTIONS[number % 8]))
    write_shard(folder / "00000.tar", records)


def act(pipeline: Path, action: str = "all", **changes: Any):
    """Run `tokenize`."""
    values = {
        "action": action,
        "data_dir": pipeline / "data",
        "run_dir": pipeline,
        "buckets": BUCKETS,
        "streams": {"low": {"path": pipeline / "image_tokenizer", "image_size": 4}},
        "encode_batch": 4,
        "block_size": 4,
        "work": {"decode_threads": 1},
        "device": "cpu",
    }
    return tokenize.run(decode(tokenize.CONFIG, values | changes), ProcessEnv())


def training(pipeline: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Keys of `train` that read all buckets."""
    return {
        "run_dir": str(run_dir),
        "data_dir": str(pipeline / "data"),
        "image_tokenizer": str(pipeline / "image_tokenizer"),
        "text_tokenizer": str(pipeline / "text_tokenizer"),
        "model": tiny_pipeline.MODEL,
        "loop": {"total_steps": 2, "log_every": 1},
        "batch_size": 8,
    } | changes
