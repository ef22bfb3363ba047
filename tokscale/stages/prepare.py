"""`prepare`: a data set of images and captions as raw shards, the first artefact of the pipeline."""

import os
import time
from pathlib import Path

import torch
from pydantic import Field, field_validator

from tokscale.base.kinds import for_each
from tokscale.base.log import logger
from tokscale.base.progress import progress
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.emoji import EmojiConfig
from tokscale.data.raw.images import centre_square, decode_image
from tokscale.data.raw.shapes.source import ShapesConfig
from tokscale.data.raw.shards import RawDataset, RawManifest, RawSample, RawShard
from tokscale.data.raw.sources import (
    CsvConfig,
    FolderConfig,
    JsonLinesConfig,
    ParquetConfig,
    SourceConfig,
    described,
    open_source,
)
from tokscale.data.raw.writer import REJECTED, RawWriter
from tokscale.dist.env import ProcessEnv
from tokscale.inference.grids import save_grid
from tokscale.runs.stage import StageConfig, StageResult, command

PREVIEW = "preview.png"
_PREVIEW_SIDE = 128
log = logger("prepare")


class PrepareConfig(StageConfig):
    """Keys of the `prepare` stage."""

    source: SourceConfig = ShapesConfig()
    """Where images and captions come from: `shapes`, `emoji`, `folder`, `csv` or `parquet`."""
    output: str = "raw"
    """Name of the folder below `data_dir`."""
    shard_samples: int = Field(default=1000, ge=1)
    """Source samples in a shard; a kill costs at most one shard of work."""
    max_drop_fraction: float = Field(default=0.02, ge=0, le=1)
    """More unusable samples than this share stop the stage: a wrong folder or format shows early."""
    threads: int = Field(default=0, ge=0)
    """Threads that read and check files; 0 takes one for each core of the process."""
    preview: int = Field(default=64, ge=0)
    """Images on the contact sheet `preview.png`; 0 makes none."""

    @field_validator("output")
    @classmethod
    def _one_name(cls, value: str) -> str:
        if not value or Path(value).name != value or value.startswith("."):
            raise ValueError(f"got {value!r}; it is the name of one folder below data_dir, such as 'raw'")
        return value


CONFIG = PrepareConfig
SUGGESTED = for_each(
    SourceConfig,
    {
        ShapesConfig: "dvae_shapes",
        EmojiConfig: "vqgan_emoji",
        FolderConfig: "vqgan_emoji",
        CsvConfig: "vqgan_emoji",
        JsonLinesConfig: "vqgan_emoji",
        ParquetConfig: "vqgan_emoji",
    },
)
"""The image tokenizer to train first, by the source of the images."""


def run(config: PrepareConfig, env: ProcessEnv) -> StageResult:
    """Write the raw shards; do nothing when they are there.

    Raises:
        DataError: When the source is missing, too many samples are unusable, or the folder holds something else.
        EnvironmentRefused: When a font or a library is not installed.
        StorageError: When the file system refuses.
    """
    folder = config.data_dir / config.output
    if env.rank != 0:
        return StageResult(f"rank 0 prepares {folder}", skipped=True)
    source = open_source(config.source, config.seed)
    writer = RawWriter(
        folder,
        source,
        described(config.source),
        classes=source.classes,
        captions=source.has_captions,
        shard_samples=config.shard_samples,
        max_drop_fraction=config.max_drop_fraction,
        threads=config.threads or len(os.sched_getaffinity(0)),
    )
    manifest, seconds = writer.finished(), None
    if manifest is None:
        started = time.monotonic()
        with progress(len(writer.source), f"preparing {config.source.kind}") as bar:
            manifest = writer.write(bar.update)
        seconds = time.monotonic() - started
        if manifest.drops:
            log.warning("left out, listed in %s: %s", folder / REJECTED, manifest.drops)
    if config.preview and not (folder / PREVIEW).exists():
        write_preview(folder, config.preview)
    return _result(config, manifest, seconds)


def write_preview(folder: Path, count: int) -> None:
    """A contact sheet of `count` images with captions, spread over the data set, as `folder/preview.png`."""
    dataset = RawDataset(folder)
    pixels, captions = [], []
    for number in range(min(count, len(dataset))):
        shard, sample = dataset.sample(number * len(dataset) // min(count, len(dataset)))
        image = decode_image(shard.image(sample), on_corrupt=lambda damage: None)
        pixels.append(centre_square(image, min(_PREVIEW_SIDE, *image.shape[1:])))
        captions.append(_caption_of(shard, sample))
    if not pixels:
        return
    side = max(image.shape[1] for image in pixels)
    save_grid(torch.stack([centre_square(image, side) for image in pixels]), captions, folder / PREVIEW)


def _caption_of(shard: RawShard, sample: RawSample) -> str:
    try:
        return shard.captions(sample)[0]
    except BadSample:
        return f"class {shard.read(sample, 'cls').decode()}" if "cls" in sample.members else ""


def _result(config: PrepareConfig, manifest: RawManifest, seconds: float | None) -> StageResult:
    folder = config.data_dir / config.output
    dropped = sum(manifest.drops.values())
    words = f"{manifest.samples} images in {len(manifest.shards)} shards in {folder}"
    words += f" of {len(manifest.classes)} classes" if manifest.classes is not None else ""
    metrics = {"samples": float(manifest.samples), "dropped": float(dropped)}
    if seconds is not None:
        metrics |= {"seconds": seconds, "images_per_second": manifest.samples / max(seconds, 1e-9)}
    return StageResult(
        summary=words + (f", {dropped} left out" if dropped else ""),
        outputs={"raw": folder},
        metrics=metrics,
        next_command=command("train-tokenizer", config),
        next_suggested=(f"tokenizer={SUGGESTED[type(config.source)]}",),
        skipped=seconds is None,
    )
