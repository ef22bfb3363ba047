"""The shapes data set as a source of raw shards."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from tokscale.base.config import Config
from tokscale.data.raw.images import encode_image
from tokscale.data.raw.shapes.grammar import Split, caption, sample_scene
from tokscale.data.raw.shapes.render import SIZE, render
from tokscale.data.raw.shards import RawRecord

VERSION = 1
"""Raised when the same settings give other images or captions than before."""


class ShapesConfig(Config):
    """One or two coloured shapes on white, with a sentence about them."""

    kind: Literal["shapes"] = "shapes"
    count: int = Field(default=20_000, ge=1)
    """Images to draw."""
    image_size: int = Field(default=SIZE, ge=32)
    """Side of the images, in pixels."""
    split: Split = "train"
    """`train` and `validation` show seen combinations, `held_out` scenes with one that they never show."""
    format: Literal["png", "jpg"] = "png"
    """PNG keeps every pixel; JPEG (quality 95) is what data sets from the web look like."""


class ShapesSource:
    """The images as a sequence of samples, each a pure function of the seed and its index."""

    classes: Sequence[str] | None = None
    has_captions = True

    def __init__(self, config: ShapesConfig, seed: int):
        self.config, self.seed = config, seed

    def __len__(self) -> int:
        return self.config.count

    def identity(self) -> Any:
        """What decides the samples beside the configuration."""
        return {"version": VERSION, "seed": self.seed}

    def name(self, index: int) -> str:
        """Its key."""
        return f"{index:09d}"

    def record(self, index: int) -> RawRecord:
        """One sample."""
        scene = sample_scene(self.seed, index, self.config.split)
        image = encode_image(render(scene, self.config.image_size), self.config.format)
        return RawRecord(f"{index:09d}", image, self.config.format, caption(scene))
