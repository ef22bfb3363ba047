"""What `train-tokenizer` trains an image tokenizer with, and how it measures the result."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from pydantic import Field
from torch import nn

from tokscale.base.config import Config, PathKey
from tokscale.base.protocols import Engine, TrainTask
from tokscale.base.shapes import Tensor, UInt8
from tokscale.data.loading import ImageLoader, ImageLoaderConfig
from tokscale.data.raw.shards import RawDataset
from tokscale.dist.comm import Comm
from tokscale.evaluation.quality import quality, reconstructed
from tokscale.inference.grids import interleave, save_grid
from tokscale.tokenizers.codec import FrozenImageTokenizer, ImageCodec
from tokscale.tokenizers.image import TrainableConfig, codec_class
from tokscale.tokenizers.quantize.base import codebook_usage
from tokscale.train.adversarial import AdversarialTask
from tokscale.train.task import SingleModelTask

TOKENIZER, DISCRIMINATOR = "tokenizer", "discriminator"
"""Names of the engines."""
_SHOWN = 32


class QualityConfig(Config):
    """What to measure of a trained tokenizer."""

    data_dir: PathKey | None = None
    """Folder whose `raw` holds images that training never saw; null for those that `data.held_out` keeps from it, or
    else those of training itself."""
    images: int = Field(default=1024, ge=2)
    """How many, from the first."""
    features: PathKey | None = None
    """A TorchScript feature extractor for rFID, such as `inception-2015-12-05.pt`; null for no rFID. It is a
    program: `allow_torchscript=true` says that you trust it."""


def tokenizer_task(
    tokenizer: TrainableConfig,
    build: Callable[[str, Callable[[], nn.Module]], Engine],
    comm: Comm,
    micro_batches: int,
) -> TrainTask:
    """The engines that a tokenizer's configuration asks for, and what a step of them is. Collective.

    Args:
        tokenizer: What to train.
        build: Makes the engine of a name around a model.
        comm: The job.
        micro_batches: Parts of a rank's share of the batch.

    Raises:
        CheckpointError: When the weights of the perceptual loss cannot be read.
    """
    engine = build(TOKENIZER, lambda: codec_class(tokenizer)(tokenizer))
    codec = cast(ImageCodec, engine.model)
    with comm.raise_together("reading what the training needs"):
        codec.prepare_training(comm.device)
    opponent = codec.opponent()
    if opponent is None:
        return SingleModelTask(engine, micro_batches)
    judge = build(DISCRIMINATOR, opponent.make)
    return AdversarialTask(engine, judge, start_step=opponent.start_step, micro_batches=micro_batches)


def show(tokenizer: FrozenImageTokenizer, images: UInt8[Tensor, "batch channels height width"], sheet: Path) -> None:
    """Images beside their reconstructions, for visual inspection."""
    images = images[:_SHOWN]
    _, rebuilt = reconstructed(tokenizer, images)
    save_grid(interleave(images, rebuilt), ["image", "rebuilt"] * len(images), sheet, columns=8, side=96)


def measure(
    tokenizer: FrozenImageTokenizer, images: UInt8[Tensor, "batch channels height width"], features: Path | None
) -> dict[str, Any]:
    """How many codes the images use, and how much of them the codes keep."""
    codes, rebuilt = reconstructed(tokenizer, images)
    usage = codebook_usage(codes, tokenizer.num_tokens)
    return {
        "codes_used": round(usage["codebook_used"].item() * tokenizer.num_tokens),
        "codebook_perplexity": usage["codebook_perplexity"].item(),
        **quality(images, rebuilt, features),
    }


def first_images(
    data_dir: Path, tokenizer: FrozenImageTokenizer, config: ImageLoaderConfig, most: int, seed: int
) -> UInt8[Tensor, "batch channels height width"]:
    """The first images of raw shards, or of what is held out from them."""
    loader = ImageLoader(
        config.model_copy(update={"shuffle": False, "prefetch": 0, "flips": False}),
        dataset=RawDataset(config.held_out.path or data_dir / "raw"),
        image_size=tokenizer.image_size,
        channels=tokenizer.channels,
        batch_size=1,
        seed=seed,
        held_out=config.held_out.share > 0,
    )
    with closing(loader):
        return loader.prepare(0, min(most, loader.samples)).pixels
