"""How images and captions become token shards. What changes the ids or the samples is part of the fingerprint."""

from typing import Literal

from pydantic import Field

from tokscale.base.config import Config
from tokscale.data.raw.images import MAX_PIXELS


class TransformConfig(Config):
    """From an image file to the tokenizer's pixels: RGB, centre square, antialiased bicubic on 8 bits."""

    member: str | None = None
    """Ending of the image files in tars of others, such as `input.jpg`; by default the first that is an image."""
    orient: bool = False
    """Turn images as their EXIF orientation says; published data sets mostly ignore it."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Larger images are left out before they are decompressed."""
    keep_corrupt: bool = False
    """Keep damaged images of which a lenient decoder makes something, grey or noise in part. They are counted."""


class VariantConfig(Config):
    """Several views of each image, of which the loader shows one at a time."""

    crops: Literal[1, 5] = 1
    """The centre square, or five squares: centre and corners of the centre square."""
    flips: bool = False
    """Also the mirror image of each."""
    scale: float = Field(default=1.1, ge=1.0)
    """With five crops: the centre square's side over a crop's (LlamaGen uses 1.1)."""

    @property
    def count(self) -> int:
        """Variants of an image."""
        return self.crops * (2 if self.flips else 1)


class FilterConfig(Config):
    """Samples that are left out for good. To leave them out of some runs only, define a view instead."""

    least: dict[str, float] = {}
    """Least values of numbers in the samples' JSON, such as `{aesthetic: 5, similarity: 0.28}`; without one a sample is
    left out."""
    most: dict[str, float] = {}
    """Most values of such, such as `{nsfw: 0.5, watermark: 0.8}`."""

    min_side: int = Field(default=0, ge=0)
    """Least width and height of the source image, in pixels."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Most that the longer side may be, as a multiple of the shorter."""
    min_caption: int = Field(default=1, ge=0)
    """Least characters of a caption; 0 also takes images without captions."""
    max_caption: int | None = Field(default=None, ge=1)
    """Most characters of a caption."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a caption, as `text_tokenizer` counts. Longer ones are left out, and with its last one a sample;
    by default they are kept whole, and each model reads as much of them as fits."""


class TextConfig(Config):
    """What is stored of captions."""

    split_lines: bool = False
    """Every line of a caption file is a caption of its own. By default the file is one caption, whatever it holds."""
    member: str = "txt"
    """Ending of the caption files in tars of others, such as `caption`, or `json` with `field`."""
    field: str | None = None
    """Where a caption is in JSON files, with dots between names: a text, or a list of several captions."""
    ids: bool = False
    """Also store the ids of the text tokenizer: saves encoding at train time, for that tokenizer and length only."""
    length: int = Field(default=256, ge=1)
    """Where stored ids are cut."""


class WorkConfig(Config):
    """How the work is shared and how it may fail; changes nothing of the result."""

    decode_threads: int = Field(default=0, ge=0)
    """Threads that decode images; 0 takes one for each core of the process."""
    queue: int = Field(default=0, ge=0)
    """Chunks of 32 images that may wait to be encoded; 0 takes two per thread and what two batches need."""
    max_drop_fraction: float = Field(default=0.02, ge=0, le=1)
    """More samples left out than this fails the unit: a wrong folder or format shows early."""
    max_attempts: int = Field(default=3, ge=1)
    """Failures after which a unit has failed for good."""
    max_deaths: int = Field(default=10, ge=1)
    """Workers that may die over a unit before it has failed for good."""
    lease_seconds: float = Field(default=120.0, gt=0)
    """A worker on another machine without a heartbeat for so long is dead."""
    retry_seconds: float = Field(default=1.0, ge=0)
    """Pause before a failed unit is tried again, when there is nothing else to do."""


class CheckConfig(Config):
    """How much `verify` looks at beyond bytes and counts."""

    reencode: int = Field(default=64, ge=0)
    """Images to encode again and compare."""
    min_agreement: float = Field(default=0.99, ge=0, le=1)
    """Least share of equal ids; on a GPU ids differ a little with its type and the batch."""
    sheet: int = Field(default=64, ge=0)
    """Images on the contact sheet, for visual inspection."""
