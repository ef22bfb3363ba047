"""Which token shards are read, and how."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat

from tokscale.base.config import Config, PlaceKey
from tokscale.data.loading.held_out import SplitConfig
from tokscale.data.loading.order import DEFAULT_WINDOW
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.tokens.manifest import CODES, TokenDataset
from tokscale.tokenizers.quantize.soft import SoftCodesConfig


class SourceConfig(Config):
    """One data set of a mixture."""

    path: PlaceKey
    """Folder of token shards, on this machine or behind an address: `s3://bucket/tokens`, `https://host/tokens`."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sources."""
    view: str | None = None
    """Name of a view to read instead of all samples."""


TextEmbeds = Literal["online", "stored"]


class TokenLoaderConfig(Config):
    """How token shards are read."""

    sources: tuple[SourceConfig, ...] = ()
    """Data sets and their weights; none means all of `data_dir/tokens`."""
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
    """Open the data sets of a configuration; `default` when it names none."""
    return [TokenDataset(source.path, config.remote) for source in config.sources] or [TokenDataset(default)]
