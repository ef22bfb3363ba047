"""The discrete VAE sharded over two ranks against the same training unsharded."""

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import ImageBatch
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, ScheduleConfig, ZeroConfig
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE

CONFIG = DiscreteVAEConfig(
    image_size=16,
    num_tokens=16,
    codebook_dim=8,
    num_layers=2,
    num_resnet_blocks=1,
    hidden_dim=8,
    straight_through=True,
    reinmax=True,
    kl_div_loss_weight=1e-3,
)
STEPS, BATCH = 12, 8


def train(comm: Comm, stage: int) -> tuple[list[float], list[float]]:
    """Global mean loss and codebook usage of each step."""

    def make() -> DiscreteVAE:
        with rng.scope(0, "init"):
            return DiscreteVAE(CONFIG)

    engine = build_engine(
        "tokenizer",
        make,
        config=ZeroConfig(stage=stage, dtype="fp32", sharded_init=stage == 3, param_persistence_threshold=0),
        optimizer=AdamWConfig(lr=3e-3),
        schedule=ScheduleConfig(),
        comm=comm,
        micro_batches=1,
        micro_batch_size=BATCH // comm.world,
        total_steps=STEPS,
    )
    rows = slice(comm.rank * BATCH // comm.world, (comm.rank + 1) * BATCH // comm.world)
    pixels = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=rng.generator(0, "pictures"), dtype=torch.uint8)
    batch = ImageBatch(positions=torch.arange(BATCH)[rows], pixels=pixels[rows])
    losses, used = [], []
    for step in range(STEPS):
        with rng.scope(0, "train", step, comm.rank):
            out = engine(batch)
            engine.backward(out.total)
        engine.step(step)
        losses.append(comm.mean({"loss": out.total.item()})["loss"])
        used.append(out.metrics["codebook_used"].item())
    return losses, used


def both_stages(comm: Comm) -> list[tuple[list[float], list[float]]]:
    return [train(comm, 0), train(comm, 3)]


def test_partitioned_training_equals_whole_training():
    (whole, whole_used), (parts, parts_used) = run_ranks(both_stages, 2)[0]
    assert whole[-1] < 0.9 * whole[0]
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts == pytest.approx(whole, rel=1e-4)  # a sampled code may flip where probabilities are close
    assert parts_used[0] == whole_used[0]
