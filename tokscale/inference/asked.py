"""What every sampler is asked for and gives back: prompts with their seeds, batch by batch, and finished images."""

from collections.abc import Iterator, Sequence
from typing import Literal

from PIL import Image

from tokscale.base.config import did_you_mean
from tokscale.base.errors import ConfigError
from tokscale.base.rng import seed_of
from tokscale.base.shapes import Tensor, UInt8
from tokscale.inference.grids import to_pil


def asked(
    prompts: str | Sequence[str], *, seed: int, seeds: Sequence[int] | None, batch_size: int
) -> Iterator[tuple[list[str], list[int]]]:
    """Batches of prompts with the seed of each.

    Args:
        prompts: Captions; a text by itself is one, and not one for each of its letters.
        seed: Base of the seeds when those are not given.
        seeds: One a prompt.
        batch_size: Prompts at once.

    Raises:
        ConfigError: When there is nothing to draw, a prompt is no text, or seeds are as many as prompts.
    """
    captions = [prompts] if isinstance(prompts, str) else list(prompts)
    if not captions:
        raise ConfigError("prompts: none given, so there is nothing to draw; give a caption, or a list of them")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ConfigError(f"prompts[{number}]: got {caption!r:.200}; give text, for a class '7'")
    if batch_size < 1:
        raise ConfigError(f"batch_size: got {batch_size}; give at least 1")
    chosen = list(seeds) if seeds is not None else [seed_of(seed, "sample", i) for i in range(len(captions))]
    if len(chosen) != len(captions):
        raise ConfigError(f"seeds: {len(captions)} prompts need as many seeds; got {len(chosen)}")
    for at in range(0, len(captions), batch_size):
        yield captions[at : at + batch_size], chosen[at : at + batch_size]


def finished(
    images: UInt8[Tensor, "prompts channels height width"], output: Literal["tensor", "pil"]
) -> UInt8[Tensor, "prompts channels height width"] | list[Image.Image]:
    """Images in the form that was asked for.

    Raises:
        ConfigError: When that is none.
    """
    if output not in ("tensor", "pil"):
        raise ConfigError(f"output: got {output!r}{did_you_mean(str(output), ('tensor', 'pil'))}")
    return [to_pil(image) for image in images] if output == "pil" else images
