"""Raw shards, a tokenizer that needs no weights, and a short way to tokenize with them."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from PIL import Image

from tokscale.data.raw.places import LocalRaw, RawPlace
from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.data.tokenization.config import (
    FilterConfig,
    TextConfig,
    TransformConfig,
    VariantConfig,
    WorkConfig,
)
from tokscale.data.tokenization.finalise import finalise, outcome
from tokscale.data.tokenization.inputs import list_inputs
from tokscale.data.tokenization.leases import Leases
from tokscale.data.tokenization.pipeline import Pipeline
from tokscale.data.tokenization.plan import Plan, make_plan
from tokscale.data.tokenization.recipe import Recipe
from tokscale.data.tokenization.work import Worker, WorkReport

CPU = torch.device("cpu")


class MeanTokenizer:
    """The code of a cell is its mean, 0 to 255, of the first channel."""

    num_tokens, channels = 256, 3

    def __init__(self, image_size: int = 8, grid: int = 2, fingerprint: str = "mean", size: tuple[int, int] = (0, 0)):
        self.cell = image_size // grid
        self.image_hw = size if any(size) else (image_size, image_size)
        self.image_size = min(self.image_hw)
        self.code_shape = (self.image_hw[0] // self.cell, self.image_hw[1] // self.cell)
        self.fingerprint = f"{fingerprint}-{self.image_hw}-{self.cell}"
        self.batches: list[int] = []

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels))
        return reduce(pixels[:, 0].float(), "b (h p) (w q) -> b h w", "mean", p=self.cell, q=self.cell).long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        pixels = codes.repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2).to(torch.uint8)
        return pixels[:, None].expand(-1, 3, -1, -1).contiguous()


def image(value: int, size: tuple[int, int] = (8, 8), form: str = "PNG", **options: Any) -> bytes:
    """An image file of one grey value."""
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, form, **options)
    return stream.getvalue()


def encoded(array: np.ndarray, form: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    """An image file of these values."""
    stream = io.BytesIO()
    Image.fromarray(array, mode).save(stream, form, **options)
    return stream.getvalue()


def plain_records(numbers: Iterable[int]) -> list[RawRecord]:
    """Sample n has the grey value n and the caption `number n`."""
    return [RawRecord(f"{n:06d}", image(n % 256), "png", f"number {n}") for n in numbers]


def make_raw(raw: Path, *sizes: int) -> Path:
    """Raw shards of so many plain samples."""
    start = 0
    for shard, size in enumerate(sizes):
        write_shard(raw / f"{shard:05d}.tar", plain_records(range(start, start + size)))
        start += size
    return raw


def make_recipe(raw: Path | RawPlace, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "raw": LocalRaw(raw) if isinstance(raw, Path) else raw,
        "tokenizers": {"codes": MeanTokenizer()},
        "text_tokenizer": None,
        "transform": TransformConfig(),
        "variants": VariantConfig(),
        "filters": FilterConfig(),
        "text": TextConfig(),
        "scores": (),
        "encode_batch": 8,
        "block_size": 16,
    }
    return Recipe(**values | changes)


def tokenize(
    folder: Path,
    recipe: Recipe,
    *,
    unit_samples: int = 1,
    threads: int = 2,
    queue: int = 0,
    stop: Callable[[], bool] = lambda: False,
    work: Mapping[str, Any] | None = None,
    close: bool = True,
) -> tuple[Plan, WorkReport]:
    """Plan, work until nothing is left, and finalise when all units are done."""
    plan = make_plan(
        folder,
        recipe.identity,
        lambda: list_inputs(recipe.raw),
        unit_samples,
        lambda plan: outcome(folder, recipe.raw, plan),
    )
    config = WorkConfig(**{"retry_seconds": 0.0} | dict(work or {}))
    pipeline = Pipeline(recipe, threads=threads, queue=queue, device=CPU, stop=stop)
    try:
        with Leases(folder, 60) as leases:
            worker = Worker(folder, plan, pipeline, leases, config, stop=stop, progress=lambda n, **metrics: None)
            report = worker.run(wait=False)
    finally:
        pipeline.close()
    if close and not report.failed_for_good:
        finalise(folder, plan, {}, allow_missing=False)
    return plan, report
