"""RQ-Transformer beside RQ-transformer 0.1.9: a training step, where its time goes, and generation.

A training step is forward and backward; the optimizer is the same for both. The original recomputes everything for each
code: its time for a whole image is extrapolated from turns of its loop at places that stand for equal shares of it.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import Config
from tokscale.bench.comparison import Comparison, original, ours
from tokscale.bench.measure import matrix_share, row
from tokscale.models.rqtransformer import RQSampling, RQTransformer, RQTransformerConfig
from tokscale.nn.strides import transpose_weights_for_decoding

SAMPLES = 4
"""Places of the original's loop that are measured, each for an equal share of its turns."""


class RQBench(Config):
    """What is compared."""

    dim: PositiveInt = 512
    """Width."""
    spatial_layers: PositiveInt = 12
    """Layers over places."""
    depth_layers: PositiveInt = 4
    """Layers over the codes of a place."""
    places: PositiveInt = 64
    """Places of an image."""
    levels: PositiveInt = 4
    """Codes of a place."""
    num_tokens: PositiveInt = 2048
    """Entries of the codebook."""
    batch: PositiveInt = 8
    """Images."""
    rounds: PositiveInt = 2
    """Rounds of the training step; generation is measured once."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where both sides compute: one thread's CPU time, or time between synchronisations of a GPU."""


CONFIG = RQBench


def rows(config: RQBench) -> Iterator[dict[str, Any]]:
    """The training step, the share of matrix products in it, and generation."""
    options = {
        "dim": config.dim,
        "spatial_layers": config.spatial_layers,
        "depth_layers": config.depth_layers,
        "max_spatial_seq_len": config.places,
        "depth_seq_len": config.levels,
        "num_tokens": config.num_tokens,
        "batch": config.batch,
    }
    size = f"{config.dim}-{config.spatial_layers}+{config.depth_layers}-{config.places}x{config.levels}-b{config.batch}"
    with Comparison(config.device) as comparison:
        mine, theirs = ours(f"{__name__}:step", **options), original("rq.py:step", **options)
        yield from comparison.rows(
            f"rq/step/{size}/fp32", mine, original=theirs, rounds=config.rounds, time=1.1, measure_memory=False
        )
        if config.device == "cpu":
            share = matrix_share(step(**options))
            yield row(f"rq/step/{size}/fp32/matrix-products", share, 0.75, "share", 1.0, more_is_better=True)
        yield generation(comparison, size, options)


def generation(comparison: Comparison, size: str, options: dict[str, Any]) -> dict[str, Any]:
    """A whole batch of images against the original's time, extrapolated."""
    total = options["max_spatial_seq_len"] * options["depth_seq_len"]
    sides = {"ours": ours(f"{__name__}:generate", **options)}
    for share in range(SAMPLES):
        known = int((share + 0.5) * total / SAMPLES)
        sides[f"original at {known}"] = original("rq.py:next_code", known=known, **options)
    found = {
        name: comparison.measure({name: case}, rounds=1, memory=False, warm=name != "ours")[name].seconds
        for name, case in sides.items()
    }
    own = found.pop("ours")
    theirs = sum(found.values()) * total / SAMPLES
    return row(f"rq/generate/{size}/fp32/vs-original/time", own, theirs, "s", 10.0)


def step(batch: int, **sizes: Any) -> Callable[[], object]:
    """Forward and backward of the loss."""
    model, codes = _model(sizes).train(), _codes(batch, sizes)
    text = torch.zeros(batch, 1, dtype=torch.long)
    tokens = TokenBatch(torch.arange(batch), text, text > 0, codes)

    def run() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(tokens).total
        loss.backward()
        return loss.item()

    return run


def generate(batch: int, **sizes: Any) -> Callable[[], object]:
    """All codes of a batch of images."""
    model = _model(sizes)
    transpose_weights_for_decoding(model)  # as a model has it that was loaded from an export
    return lambda: model.generate(batch=batch, options=RQSampling()).float().mean().item()


def _model(sizes: dict[str, Any]) -> RQTransformer:
    with rng.scope(0, "bench", "rq"):
        return RQTransformer(RQTransformerConfig(**sizes))


def _codes(batch: int, sizes: dict[str, Any]) -> torch.Tensor:
    shape = (batch, sizes["max_spatial_seq_len"], sizes["depth_seq_len"])
    return torch.randint(1, sizes["num_tokens"], shape, generator=rng.generator(0, "bench", "codes"))
