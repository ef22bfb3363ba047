"""`bench parti`: training steps and guided sampling of Parti beside parti-pytorch.

Both sides have the original's decoder, the same sizes and the same shapes. What sampling takes in the original is
worked out from rounds of its loop at three lengths, since one batch of images takes it hours; ours is sampled whole.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt

from tokscale.base import rng
from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.config import Config
from tokscale.bench.comparison import Comparison, original, ours
from tokscale.bench.measure import row
from tokscale.models.parti import Parti, PartiConfig, PartiSampling
from tokscale.nn.conditioning import EmbeddingsConfig
from tokscale.nn.strides import transpose_weights_for_decoding

STEP_TARGETS = {16: 1.3, 32: 2.0}
"""How much faster a training step is to be, by the side of the grid."""
SAMPLE_TARGETS = {16: 20.0, 32: 60.0}
"""Likewise, of sampling."""
_PLACES = (0.0, 0.5, 1.0)


class PartiBench(Config):
    """What `bench parti` measures."""

    parts: tuple[Literal["step", "sample"], ...] = ("step", "sample")
    """Whole training steps, sampling with guidance."""
    grids: tuple[PositiveInt, ...] = (16, 32)
    """Sides of the grid of codes."""
    dim: int = Field(default=512, ge=1)
    """Width."""
    depth: int = Field(default=12, ge=1)
    """Layers."""
    heads: int = Field(default=8, ge=1)
    """Attention heads, of 64."""
    codes: int = Field(default=8192, ge=2)
    """Entries of the codebook."""
    words: int = Field(default=128, ge=1)
    """States of a caption."""
    width: int = Field(default=512, ge=1)
    """Of each state."""
    batch: int = Field(default=4, ge=1)
    """Images of a step, and images sampled together."""
    remat: Literal["none", "block"] = "none"
    """Of our training step."""
    rounds: int = Field(default=2, ge=1)
    """Interleaved rounds of the training steps; the best of each side counts."""
    warm: bool = True
    """Whether a round that is not counted comes before them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where both sides compute: one thread's CPU time, or time between synchronisations of a GPU."""


CONFIG = PartiBench


def rows(config: PartiBench) -> Iterator[dict[str, Any]]:
    """Measure."""
    names = ("dim", "depth", "heads", "codes", "words", "width", "batch")
    sizes = {name: getattr(config, name) for name in names}
    with Comparison(config.device) as comparison:
        for grid in config.grids:
            options = sizes | {"grid": grid}
            shape = f"{config.batch}x{grid}x{grid}/fp32"
            if "step" in config.parts:
                mine = ours(f"{__name__}:step", remat=config.remat, **options)
                again = {"rounds": config.rounds, "warm": config.warm, "time": STEP_TARGETS.get(grid), "memory": 2.0}
                yield from comparison.rows(
                    f"parti/step/{shape}", mine, original=original("parti.py:step", **options), limit=True, **again
                )
            if "sample" in config.parts:
                yield _sample(comparison, f"parti/sample/{shape}", options, SAMPLE_TARGETS.get(grid))


def _sample(comparison: Comparison, case: str, options: dict[str, Any], target: float | None) -> dict[str, Any]:
    image = options["grid"] ** 2
    own = comparison.measure({"ours": ours(f"{__name__}:sample", **options)}, rounds=1, memory=False, warm=False)
    each = [
        comparison.measure(
            {"original": original("parti.py:draw_at", at=round(place * (image - 1)), **options)}, rounds=1, memory=False
        )["original"].seconds
        for place in _PLACES
    ]
    # A pass grows smoothly with its length, so Simpson's rule over three of them gives the sum of all.
    theirs = image * (each[0] + 4 * each[1] + each[2]) / 6
    return row(f"{case}/vs-original/time", own["ours"].seconds, theirs, "s", target)


def step(*, remat: str, **options: Any) -> Callable[[], object]:
    """Forward and backward of a whole training step."""
    model, batch = _made(remat=remat, **options)

    def call() -> float:
        model.zero_grad()
        loss = model(batch).total
        loss.backward()
        return loss.item()

    return call


def sample(**options: Any) -> Callable[[], object]:
    """A batch of images, drawn with guidance."""
    model, batch = _made(remat="none", **options)
    transpose_weights_for_decoding(model)  # as a model has it that was loaded from an export
    how, seeds = PartiSampling(cond_scale=3.0, filter_thres=0.9), list(range(len(batch)))
    return lambda: model.generate_codes(batch.text, batch.text_mask, options=how, seeds=seeds, extra=batch.extra)


def _made(*, grid: int, batch: int, codes: int, words: int, width: int, **sizes: Any) -> tuple[Parti, TokenBatch]:
    shape = {"num_image_tokens": codes, "image_grid": (grid, grid), "max_text_len": words}
    with rng.scope(0, "bench", "parti"):
        model = Parti(PartiConfig(condition=EmbeddingsConfig(width=width), **shape, **sizes))
    random = rng.generator(0, "bench", "parti", "batch")
    mask = torch.ones(batch, words, dtype=torch.bool)
    states = torch.randn(batch, words, width, generator=random)
    ids = torch.randint(0, codes, (batch, grid, grid), generator=random)
    extra = {TEXT_EMBEDS: states, TEXT_EMBEDS_MASK: mask}
    return model, TokenBatch(torch.arange(batch), torch.ones_like(mask, dtype=torch.long), mask, ids, extra=extra)
