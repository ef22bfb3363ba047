"""Which token shards are read, and how."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat

from tokscale.base.address import Address, address
from tokscale.base.config import Config, PlaceKey, did_you_mean
from tokscale.base.errors import DataError
from tokscale.data.loading.held_out import SplitConfig
from tokscale.data.loading.order import DEFAULT_WINDOW
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.tokens.manifest import CODES, TokenDataset, buckets_in
from tokscale.tokenizers.quantize.soft import SoftCodesConfig


class SourceConfig(Config):
    """One data set of a mixture."""

    path: PlaceKey
    """Folder of token shards, on this machine or behind an address: `s3://bucket/tokens`, `https://host/tokens`. Or the
    folder of several buckets, each of which is then read in proportion to its samples."""
    buckets: tuple[str, ...] = ()
    """Of a folder of several buckets, those to read, e.g. `[256x256, 320x192]`; all when left out, but for an address,
    where they have to be named."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sources."""
    view: str | None = None
    """Name of a view to read instead of all samples."""


TextEmbeds = Literal["online", "stored"]


class TokenLoaderConfig(Config):
    """How token shards are read."""

    sources: tuple[SourceConfig, ...] = ()
    """Data sets and their weights; none means all of `data_dir/tokens`. They may hold images of several shapes: each
    batch is then of one of them."""
    held_out: SplitConfig = SplitConfig()
    """Samples that training never sees; on them the loss is measured while it trains (`held_out`)."""
    shuffle: bool = True
    """False reads in the stored order, for evaluation."""
    window: int = Field(default=DEFAULT_WINDOW, ge=1)
    """Blocks that are shuffled together, 256 samples each by default. Part of the order."""
    partitions: int = Field(default=1, ge=1)
    """Independent block lists, for payloads too heavy for every rank to read every block. Divides the global batch."""
    prefetch: int = Field(default=4, ge=0)
    """Batches that a thread prepares ahead; 0 reads in the training thread."""
    codes: str = CODES
    """Stream of the model's own codes. `codes.low` trains a base model on what a super-resolution model is told, from
    the same token shards; `image_tokenizer` is then that of the low resolution."""
    streams: tuple[str, ...] = ()
    """Further code streams to give as `TokenBatch.extra`, e.g. `codes.low`."""
    caption_weights: tuple[NonNegativeFloat, ...] = ()
    """Relative chance of an image's first, second, ... caption; captions beyond the list count as 1."""
    text_embeds: TextEmbeds = "online"
    """Where a text encoder's states come from, for models that are told them: the encoder reads each batch's captions,
    or they were stored by `tokenize action=embed`."""
    soft_codes: SoftCodesConfig | None = None
    """Codes drawn anew in every epoch, and their distributions as targets, for RQ-Transformer on residual codes."""
    on_bad_block: Literal["error", "substitute"] = "error"
    """Whether a damaged block stops the run, or other samples take its place."""
    max_bad_blocks: int = Field(default=16, ge=0)
    """Damaged blocks of a data set that may be substituted before it is an error after all."""
    remote: RemoteConfig = RemoteConfig()
    """How sources behind an address are read."""
    on_change: Literal["error", "segment"] = "error"
    """When a run resumes with other data sets or weights: refuse, or go on with them from there, on the record."""


def open_sources(config: TokenLoaderConfig, default: Path) -> list[TokenDataset]:
    """Open the data sets of a configuration, `default` when it names none; of a folder of buckets, each of them.

    Raises:
        DataError: When one is not there, or not finished.
    """
    return [TokenDataset(folder, config.remote) for folder in folders_of(config, default)]


def folders_of(config: TokenLoaderConfig, default: Path) -> list[Path | Address]:
    """Where the data sets of a configuration lie; see `open_sources`."""
    return [folder for source in config.sources or (SourceConfig(path=default),) for folder in _folders(source)]


def _folders(source: SourceConfig) -> list[Path | Address]:
    if not isinstance(source.path, Path):  # nobody can look around behind every kind of address
        place = address(source.path)
        return [place / name for name in source.buckets] or [place]
    there = buckets_in(source.path)
    if not source.buckets:
        return [*there] or [source.path]
    names = [folder.name for folder in there]
    for name in source.buckets:
        if name not in names:
            raise DataError(f"data.sources: {source.path} has no bucket {name!r}{did_you_mean(name, names)}")
    return [folder for folder in there if folder.name in source.buckets]


def source_of(config: TokenLoaderConfig, datasets: Sequence[TokenDataset]) -> list[int]:
    """Which source each data set is of, by its number."""
    if len(config.sources) == len(datasets):
        return list(range(len(datasets)))
    paths = [str(source.path).rstrip("/") for source in config.sources]
    # Of a folder of buckets, each bucket is a data set of that source.
    places = [(str(dataset.folder).rstrip("/"), str(dataset.folder.parent)) for dataset in datasets]
    return [next((at for at, path in enumerate(paths) if path in place), 0) for place in places]
