"""What is measured on images with captions: a model's loss, and how well CLIP thinks that they fit."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tokscale.base.batch import TokenBatch
from tokscale.base.errors import DataError
from tokscale.base.log import logger
from tokscale.base.rng import mix64
from tokscale.base.shapes import Float, Int, Tensor, UInt8
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.images import centre_square, decode_image, resize
from tokscale.data.raw.shards import IMAGE_ENDINGS, RawDataset
from tokscale.data.tokenization.buckets import choose_bucket
from tokscale.data.tokenization.config import VariantConfig
from tokscale.data.tokenization.variants import crops

log = logger("evaluate")


class NoneOfThatShapeError(DataError):
    """Raw shards hold no image of a shape."""


@dataclass(frozen=True)
class Shape:
    """Images of one shape among those of several, told apart as tokenization does it."""

    size: tuple[int, int]
    """Rows and columns in pixels."""
    among: tuple[tuple[int, int], ...]
    """Of all shapes, in the order of the buckets."""

    def has(self, pixels: UInt8[Tensor, "channels height width"]) -> bool:
        """Whether an image goes to this bucket."""
        height, width = pixels.shape[1:]
        return choose_bucket(width, height, dict(zip(map(str, self.among), self.among, strict=True))) == str(self.size)

    def cut(self, pixels: UInt8[Tensor, "channels height width"]) -> UInt8[Tensor, "channels rows columns"]:
        """The largest part of that shape at the centre, scaled to the size."""
        crop, *_ = crops(pixels.shape[2], pixels.shape[1], VariantConfig(), self.size)
        return resize(pixels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width], self.size)


def load_eval_pairs(
    raw: Path,
    side: int | Shape,
    *,
    at_most: int | None = None,
    split_lines: bool = False,
    classes: bool = False,
) -> tuple[list[str], UInt8[Tensor, "batch channels height width"]]:
    """First captions and images of raw shards, spread over the whole set when it holds more than `at_most`.

    Args:
        raw: Folder of raw shards.
        side: Of the central square in pixels; or the images of one shape alone.
        at_most: Images; all when left out.
        split_lines: Every line of a caption file is a caption of its own.
        classes: The number of a sample's class takes the place of its caption.

    What cannot be used is left out and said.

    Raises:
        DataError: When there are none.
        NoneOfThatShapeError: When there are none of that shape.
    """
    dataset = _opened(raw)
    count = len(dataset) if at_most is None else min(at_most, len(dataset))
    if not count:
        raise DataError(f"{raw}: no images; write some with `tokscale prepare`, or name another folder")
    numbers = [number * len(dataset) // count for number in range(count)]
    if isinstance(side, Shape):  # which ones are of the shape is seen by looking: in an order that is spread anyway
        numbers = mix64(torch.arange(len(dataset))).argsort().tolist()
    captions, images = [], []
    unusable: list[tuple[str, BadSample]] = []
    for number in numbers:
        if len(images) == count:
            break
        shard, sample = dataset.sample(number)
        try:
            told = str(shard.label(sample)) if classes else shard.captions(sample, split_lines=split_lines)[0]
            pixels = decode_image(shard.image(sample))
        except BadSample as error:
            unusable.append((sample.key, error))
            continue
        if isinstance(side, Shape):
            if not side.has(pixels):
                continue
            images.append(side.cut(pixels))
        else:
            images.append(centre_square(pixels, side))
        captions.append(told)
    if isinstance(side, Shape) and not images:
        raise NoneOfThatShapeError(f"{raw}: no image of the shape {side.size[1]}x{side.size[0]}")
    if not unusable:
        return captions, torch.stack(images)
    key, error = unusable[0]
    if not images:
        way = _WAYS.get(error.reason, "name another folder")
        raise DataError(f"{raw}: none of {count} samples can be used, the first: {key}: {error}; {way}")
    log.warning("%s: %d of %d samples cannot be used, the first: %s: %s", raw, len(unusable), count, key, error)
    return captions, torch.stack(images)


_WAYS = {
    "caption_missing": "give images with captions, which this model is told",
    "label": "give images with their classes, or leave out what needs classes",
}
"""Out of what all samples lack."""


def _opened(raw: Path) -> RawDataset:
    """Raw shards; whoever names something else is told how it becomes some."""
    if not raw.is_dir():
        raise DataError(f"{raw}: no such folder; name one of raw shards, as `tokscale prepare` writes them")
    try:
        return RawDataset(raw)
    except DataError as error:
        if not any(path.suffix.lower().lstrip(".") in IMAGE_ENDINGS for path in raw.iterdir()):
            raise
        raise DataError(
            f"{raw}: holds image files and no raw shards; write these with `tokscale prepare data_dir=FOLDER "
            f"source.kind=folder source.path={raw}`, then name FOLDER/raw"
        ) from error


@torch.inference_mode()
def mean_losses(model: nn.Module, batches: Iterable[TokenBatch]) -> dict[str, float]:
    """Mean of a model's loss (`total`) and of its parts over batches, weighted by their sizes.

    Raises:
        DataError: When there are no batches.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        size = len(batch.text)
        loss = model(batch)
        for name, value in {"total": loss.total, **loss.parts}.items():  # on the device: no batch waits
            sums[name] = sums.get(name, 0.0) + value.double() * size
        count += size
    if not count:
        raise DataError("no images to measure a loss on; give some with held_out=FOLDER")
    return {name: value.item() / count for name, value in sums.items()}


def clip_metrics(
    captions: Float[Tensor, "pairs latent"], images: Float[Tensor, "pairs latent"], top: int
) -> dict[str, float]:
    """How well images fit their captions, by the unit vectors that a CLIP gives both.

    Returns:
        `score`: 100 times the mean cosine of the pairs, negative ones counted as 0 (Hessel et al. 2021,
        arXiv:2104.08718); `found`: share of images whose own caption is among the `top` best of all captions;
        `chance`: what guessing finds; `times_chance`: their ratio.
    """
    found = (retrieval_rank(captions, images) < top).double().mean().item()
    chance = min(top / len(captions), 1.0)
    return {
        "score": 100 * (captions * images).sum(-1).clamp(min=0).mean().item(),
        "found": found,
        "top": float(top),
        "pool": float(len(captions)),
        "chance": chance,
        "times_chance": found / chance,
    }


def best(scores: Float[Tensor, "prompts candidates"], keep: int) -> Int[Tensor, "prompts keep"]:
    """Numbers of the `keep` best candidates of each prompt, the best first; of equals the first comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :keep]


def retrieval_rank(
    captions: Float[Tensor, "pool latent"], images: Float[Tensor, "pool latent"]
) -> Int[Tensor, " pool"]:
    """For each image, how many captions of the pool fit it better than its own; equals count as better."""
    similar = images @ captions.t()
    own = similar.diagonal()[:, None]
    return (similar >= own).sum(-1) - 1
