"""Raw images to batches in the order of token shards: a pure function of the position, resumable anywhere."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from pydantic import Field

from tokscale.base.batch import ImageBatch
from tokscale.base.config import Config
from tokscale.base.errors import DataError
from tokscale.base.log import logger
from tokscale.base.protocols import TextTokenizer
from tokscale.base.rng import seed_of, uniform_at
from tokscale.base.shapes import Bool, Tensor, UInt8
from tokscale.data.loading.collate import encode_captions
from tokscale.data.loading.held_out import SplitConfig, held_out_flags
from tokscale.data.loading.order import DEFAULT_WINDOW, ORDER_VERSION, BlockOrder
from tokscale.data.loading.stream import PositionLoader
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.images import centre_square, decode_image, with_channels
from tokscale.data.raw.shards import RawDataset
from tokscale.data.tokens.blocks import BLOCK_SIZE

log = logger("data")


class ImageLoaderConfig(Config):
    """How raw images are read for training."""

    held_out: SplitConfig = SplitConfig()
    """Images that training never sees; on them is measured while it trains (`held_out`)."""
    shuffle: bool = True
    """False reads in the stored order, for evaluation."""
    window: int = Field(default=DEFAULT_WINDOW, ge=1)
    """Groups of 256 neighbouring images that are shuffled together. Part of the order."""
    threads: int = Field(default=2, ge=1)
    """Threads that decode images; for a fast GPU as many as there are cores for its rank (`data_wait` tells)."""
    prefetch: int = Field(default=4, ge=0)
    """Batches prepared ahead; 0 prepares in the training thread."""
    cache_mb: int = Field(default=1024, ge=0)
    """Decoded images are kept in memory up to this many megabytes a rank, so that small sets are decoded once."""
    orient: bool = False
    """Turn images as their EXIF orientation says."""
    keep_corrupt: bool = False
    """Take damaged images of which a lenient decoder makes something, grey or noise in part."""
    flips: bool = False
    """Mirror half of the images, chosen anew in each pass."""
    split_lines: bool = False
    """Every line of a caption file is a caption of its own, of which one is chosen anew in each pass. For models that
    read captions."""
    max_bad_samples: int = Field(default=100, ge=0)
    """Unusable images whose place the next usable one takes, before it is an error."""


@dataclass(frozen=True)
class _DecodedImage:
    pixels: UInt8[Tensor, "channels height width"]
    key: str
    captions: Sequence[str]


class ImageLoader(PositionLoader[ImageBatch, ImageBatch]):
    """One rank's share of an endless stream of square images: `base.protocols.Loader`."""

    def __init__(
        self,
        config: ImageLoaderConfig,
        *,
        dataset: RawDataset,
        image_size: int,
        channels: int = 3,
        text_tokenizer: TextTokenizer | None = None,
        text_length: int = 0,
        comm_rank: int = 0,
        comm_world: int = 1,
        batch_size: int,
        seed: int,
        held_out: bool = False,
    ):
        """Describe the stream; nothing is read before the first batch.

        Args:
            config: How to read.
            dataset: Opened raw shards.
            image_size: Side of the images in pixels: the central square is taken and scaled.
            channels: 3, or 1 for grey (the mean weight of the eye), or 4 with an opaque alpha channel.
            text_tokenizer: For models that read captions, too.
            text_length: Width of the caption ids.
            comm_rank: This rank among those that share the batch.
            comm_world: How many they are.
            batch_size: Samples of a global batch.
            seed: Of the order.
            held_out: Read the images that `config.held_out.share` keeps from training.

        Raises:
            ConfigError: When the ranks do not divide the batch.
            DataError: When there is no image, or all or none would be held out.
        """
        super().__init__(batch_size=batch_size, rank=comm_rank, world=comm_world, prefetch=config.prefetch)
        self.config, self._dataset, self._size, self._channels = config, dataset, image_size, channels
        self._text_tokenizer, self._text_length, self._seed = text_tokenizer, text_length, seed
        self._mine = _part(dataset, config.held_out.share, held_out)
        self._kept = None if self._mine is None else self._mine.nonzero().flatten()
        whole, rest = divmod(self.samples, BLOCK_SIZE)
        sizes = torch.tensor([BLOCK_SIZE] * whole + [rest] * (rest > 0), dtype=torch.int64)
        self._order = BlockOrder(
            sizes, seed=seed_of(seed, "order", "pictures"), window=config.window, shuffle=config.shuffle
        )
        self._cache: dict[int, _DecodedImage] = {}
        self._capacity = config.cache_mb * 2**20 // (channels * image_size**2)
        self._bad: set[int] = set()
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="decode")

    @property
    def samples(self) -> int:
        """Images of one pass."""
        return len(self._dataset) if self._kept is None else len(self._kept)

    def order_settings(self) -> Mapping[str, Any]:
        """See `PositionLoader`."""
        settings = {
            "order_version": ORDER_VERSION,
            "seed": self._seed,
            "shuffle": self.config.shuffle,
            "window": self.config.window,
            "samples": len(self._dataset),
        }
        settings |= {"held_out": self.config.held_out.share} if self.config.held_out.share else {}
        return settings | ({"flips": True} if self.config.flips else {})

    def prepare(self, start: int, stop: int) -> ImageBatch:
        """Read and decode, on the threads of the pool."""
        blocks, rows = self._order.locate(start, stop)
        numbers = blocks * BLOCK_SIZE + rows
        indices = (numbers if self._kept is None else self._kept[numbers]).tolist()
        missing = [index for index in dict.fromkeys(indices) if index not in self._cache]
        fresh = dict(zip(missing, self._pool.map(self._read, missing), strict=True))
        images = [fresh[index] if index in fresh else self._cache[index] for index in indices]
        self._keep(fresh)
        positions = torch.arange(start, stop)
        draw = uniform_at(positions, self._seed, "data", "caption").tolist()
        captions = [image.captions[int(u * len(image.captions))] for image, u in zip(images, draw, strict=True)]
        text, mask = encode_captions(captions, self._text_tokenizer, self._text_length)
        pixels = torch.stack([image.pixels for image in images])
        if self.config.flips:
            mirrored = uniform_at(positions, self._seed, "data", "variant") < 0.5
            pixels = torch.where(rearrange(mirrored, "b -> b 1 1 1"), pixels.flip(-1), pixels)
        return ImageBatch(
            positions=positions,
            pixels=pixels,
            keys=[image.key for image in images],
            text=text,
            text_mask=mask,
        )

    def deliver(self, prepared: ImageBatch) -> ImageBatch:
        """The task moves batches to the device."""
        return prepared

    def _keep(self, fresh: Mapping[int, _DecodedImage]) -> None:
        for index, image in fresh.items():
            if len(self._cache) < self._capacity:  # a full cache keeps what it has: which images does not matter
                self._cache[index] = image

    def _read(self, index: int) -> _DecodedImage:
        """Image `index`, or the next usable one after it: a pure function of the shards, equal on all ranks.

        What takes its place is of the same part, so that no held-out image gets into training.
        """
        count = len(self._dataset)
        for candidate in range(index, index + count):
            if self._mine is not None and not self._mine[candidate % count]:
                continue
            shard, sample = self._dataset.sample(candidate % count)
            try:
                pixels = decode_image(
                    shard.image(sample),
                    orient=self.config.orient,
                    on_corrupt=(lambda damage: None) if self.config.keep_corrupt else None,
                )
                captions = (
                    shard.captions(sample, split_lines=self.config.split_lines) if self._text_tokenizer else ("",)
                )
            except BadSample as problem:
                self._count_bad(candidate % count, f"{shard.path}: {sample.key}: {problem}")
                continue
            pixels = with_channels(centre_square(pixels, self._size), self._channels)
            return _DecodedImage(pixels.contiguous(), sample.key, captions)
        raise DataError(f"{self._dataset.folder}: no usable image among {count}; name another data_dir")

    def _count_bad(self, index: int, problem: str) -> None:
        if index in self._bad:
            return
        self._bad.add(index)
        if len(self._bad) > self.config.max_bad_samples:
            raise DataError(
                f"{problem}; that is unusable image number {len(self._bad)}, more than data.max_bad_samples="
                f"{self.config.max_bad_samples}; raise that, or mend the image: `tokscale prepare` leaves such ones out"
            )
        log.warning("%s; the next image takes its place", problem)


def _part(dataset: RawDataset, share: float, held_out: bool) -> Bool[Tensor, " samples"] | None:
    """Which samples are read; None for all. Reads every shard's list of members."""
    if not share:
        return None
    keys = [dataset.sample(index)[1].key for index in range(len(dataset))]
    flags = torch.from_numpy(held_out_flags(keys, share))
    if flags.all() or not flags.any():
        raise DataError(
            f"{dataset.folder}: data.held_out.share={share:g} holds {int(flags.sum())} of {len(flags)} images out; "
            "choose another share, or 0 to hold none out"
        )
    return flags if held_out else ~flags
