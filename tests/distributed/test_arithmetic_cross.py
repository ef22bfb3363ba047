"""Every model on every engine in every arithmetic learns, and bf16 learns what fp32 does.

Autocast (eager, ZeRO 0 and 1) and whole bf16 weights (ZeRO 2 and 3) break in different places: a function with a
backward pass of its own that saved inputs of two types crashed under the first alone.
"""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import Batch, ImageBatch, TokenBatch
from tokscale.base.config import Config, decode
from tokscale.cli.compose import compose
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine import build
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.models import registry
from tokscale.models.registry import build_model
from tokscale.stages import registry as stages
from tokscale.stages.train import TrainConfig, seeded

WITHOUT_RECIPE: dict[str, dict[str, Any]] = {"hierarchical": {"dim": 32, "heads": 2, "dim_head": 16, "depth": (2, 2)}}
KINDS = sorted(kind for kind, cls in registry.MODELS.usable().items() if cls.__module__.startswith("tokscale."))
ENGINES = {"eager": EagerConfig} | {f"zero{stage}": ZeroConfig for stage in range(4)}
DTYPES = ("fp32", "bf16", "auto")
STEPS, BATCH = 4, 4


def model_of(kind: str) -> Config:
    """The model of the kind's debug recipe: with its own defaults, which are what people train with."""
    levels = (2,) if kind == "rqtransformer" else ()
    image = SimpleNamespace(num_tokens=32, image_size=32, channels=3, code_shape=(4, 4, *levels), fingerprint="f")
    words = SimpleNamespace(num_tokens=300, fingerprint="t")
    if kind in WITHOUT_RECIPE:
        model: Any = decode(registry.MODELS.find(kind).config_class, WITHOUT_RECIPE[kind])
        return model.fitted(image, words)
    values = compose(stages.find("train"), [f"recipe=debug/{kind}"])
    return decode(TrainConfig, values).model.fitted(image, words)


def batch_of(config: Any) -> Batch:
    draw = rng.generator(0, "cross", config.kind)
    width = config.text_seq_len
    text, positions = torch.randint(1, 300, (BATCH, width), generator=draw), torch.arange(BATCH)
    if registry.model_class(config).reads == "images":
        pixels = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=draw, dtype=torch.uint8)
        return ImageBatch(positions=positions, pixels=pixels, text=text, text_mask=text > 0)
    shape = (4, 4, 2) if config.kind == "rqtransformer" else (4, 4)
    codes = torch.randint(0, 32, (BATCH, *shape), generator=draw)
    return TokenBatch(positions=positions, text=text, text_mask=text > 0, codes=codes)


def losses(comm: Comm, kind: str, engine: str, dtype: str) -> list[float]:
    config, options = model_of(kind), {} if engine == "eager" else {"stage": int(engine[-1])}
    built = build_engine(
        "model",
        seeded(lambda: build_model(config), 0, "model"),
        config=ENGINES[engine](dtype=dtype, **options),
        optimizer=AdamWConfig(lr=3e-3),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=BATCH,
        total_steps=STEPS,
    )
    batch, found = batch_of(config), []
    for step in range(STEPS):
        with rng.scope(0, "cross"):  # the same choices at every step, so that a loss can only fall by learning
            loss = built(batch).total
            built.backward(loss)
        built.step(step)
        found.append(loss.item())
    return found


def all_cases(comm: Comm, kinds: list[str], auto: str) -> dict[tuple[str, ...], list[float]]:
    torch.set_num_threads(1)
    build.computes_bf16 = lambda device: auto == "bf16"  # whatever this machine's processor can do
    cases = itertools.product(kinds, ENGINES, DTYPES)
    return {case: losses(comm, *case) for case in cases}


@pytest.fixture(scope="module")
def cross() -> dict[tuple[str, ...], list[float]]:
    return run_ranks(all_cases, 1, KINDS, "bf16", timeout=600.0)[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_learns_on_every_engine_in_every_arithmetic(cross, kind, engine):
    exact = cross[kind, "eager", "fp32"]
    assert exact[-1] < exact[0]
    for dtype in DTYPES:
        found = cross[kind, engine, dtype]
        assert found[-1] < found[0], dtype
        assert found == pytest.approx(exact, rel=1e-4 if dtype == "fp32" else 3e-2), dtype
    assert cross[kind, engine, "auto"] == cross[kind, engine, "bf16"] != cross[kind, engine, "fp32"]
