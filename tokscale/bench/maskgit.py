"""`bench maskgit`: a training step and sampling beside muse-maskgit-pytorch, with its attention on and off.

The same sizes, the same share of dropped texts, random weights and codes. What `generate` draws is held to be the
original's, from its weights and under its noise, by tests/numerics/test_maskgit_parity.py.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field

from tokscale.base import rng
from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.config import Config
from tokscale.bench.comparison import Comparison, original, ours
from tokscale.models.maskgit import MaskGit, MaskGitConfig, MaskGitSampling
from tokscale.nn.strides import transpose_weights_for_decoding

STEP = {"original": 1.25, "flash": 2.0}
"""How much faster a training step is to be than the original without and with its flash attention."""
MEMORY, GENERATE = 1.5, 1.25
"""How much smaller a step's peak memory, how much faster sampling."""


class MaskGitBench(Config):
    """What `bench maskgit` measures."""

    parts: tuple[Literal["step", "generate"], ...] = ("step", "generate")
    """A training step, and drawing images."""
    dim: int = Field(default=512, ge=8)
    """Width of the model."""
    depth: int = Field(default=12, ge=1)
    """Layers."""
    side: int = Field(default=16, ge=2)
    """Rows and columns of the codes."""
    num_tokens: int = Field(default=1024, ge=2)
    """Codes of the codebook."""
    words: int = Field(default=64, ge=1)
    """Text states, as wide as the model."""
    batch: int = Field(default=8, ge=1)
    """Samples of a training step."""
    images: int = Field(default=2, ge=1)
    """Images drawn at once."""
    timesteps: int = Field(default=18, ge=1)
    """Steps of sampling."""
    rounds: int = Field(default=2, ge=1)
    """Interleaved rounds; the best of each side counts."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where both sides compute: one thread's CPU time, or time between synchronisations of a GPU."""


CONFIG = MaskGitBench


def rows(config: MaskGitBench) -> Iterator[dict[str, Any]]:
    """Measure, and yield the rows of the report."""
    names = ("dim", "depth", "side", "num_tokens", "words")
    sizes = {name: getattr(config, name) for name in names}
    with Comparison(config.device) as comparison:
        if "step" in config.parts:
            keys = sizes | {"batch": config.batch}
            mine = ours(f"{__name__}:step", **keys)
            theirs, flash = (original("maskgit.py:step", flash=flash, **keys) for flash in (False, True))
            case = f"maskgit/step/b{config.batch}/fp32"
            yield from comparison.rows(
                case, mine, original=theirs, flash=flash, time=STEP, memory=MEMORY, limit=True, rounds=config.rounds
            )
        if "generate" in config.parts:
            keys = sizes | {"batch": config.images, "timesteps": config.timesteps}
            mine, theirs = ours(f"{__name__}:generate", **keys), original("maskgit.py:generate", flash=False, **keys)
            case = f"maskgit/generate/b{config.images}/fp32"
            yield from comparison.rows(
                case, mine, original=theirs, time=GENERATE, measure_memory=False, rounds=config.rounds, warm=False
            )


def step(batch: int, **sizes: int) -> Callable[[], object]:
    """Loss and gradients of one batch; the next call is of the next positions."""
    model, number = _model(**sizes).train(), [0]

    def call() -> None:
        number[0] += 1
        model.zero_grad(set_to_none=True)
        model(_batch(batch, number[0] * batch, **sizes)).total.backward()

    return call


def generate(batch: int, timesteps: int, **sizes: int) -> Callable[[], object]:
    """Images with guidance."""
    model, data = _model(**sizes), _batch(batch, 0, **sizes)
    transpose_weights_for_decoding(model)  # as a model has it that was loaded from an export
    options, seeds = MaskGitSampling(timesteps=timesteps, cond_scale=3.0), list(range(batch))
    return lambda: model.generate_codes(data.text, data.text_mask, options=options, seeds=seeds, extra=data.extra)


def _model(dim: int, depth: int, side: int, num_tokens: int, words: int) -> MaskGit:
    del words
    condition = {"kind": "embeddings", "width": dim}
    config = MaskGitConfig.model_validate(
        {"dim": dim, "depth": depth, "image_grid": (side, side), "num_tokens": num_tokens, "condition": condition}
    )
    with rng.scope(0, "bench", "maskgit"):
        return MaskGit(config)


def _batch(batch: int, first: int, dim: int, depth: int, side: int, num_tokens: int, words: int) -> TokenBatch:
    del depth
    stream = rng.generator(0, "bench", "maskgit", "batch")
    states = torch.randn(batch, words, dim, generator=stream)
    nothing = torch.zeros(batch, 0, dtype=torch.int64)
    return TokenBatch(
        positions=torch.arange(first, first + batch),
        text=nothing,
        text_mask=nothing.bool(),
        codes=torch.randint(0, num_tokens, (batch, side, side), generator=stream),
        extra={TEXT_EMBEDS: states, TEXT_EMBEDS_MASK: torch.ones(batch, words, dtype=torch.bool)},
    )
