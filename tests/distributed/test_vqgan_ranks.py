"""The RQ-VAE divided over two ranks against the same training in one process."""

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import ImageBatch
from tokscale.base.config import decode
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import snapshot
from tokscale.tokenizers.quantize.config import VQConfig
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.model import VQGAN

CONFIG = decode(
    VQGANConfig,
    {
        "image_size": 16,
        "network": {"kind": "resnet", "dim": 8, "layers": 2},
        "quantizer": {"kind": "residual", "num_tokens": 16, "dim": 4, "levels": 2, "decay": 0.9, "revive_every": 3},
    },
)
MOVED = CONFIG.model_copy(
    update={"quantizer": decode(VQConfig, {"num_tokens": 16, "dim": 4, "update": "loss", "cosine": True})}
)
STEPS, BATCH = 12, 8
DIVIDED = ZeroConfig(stage=3, sharded_init=True, param_persistence_threshold=0)


def train(comm: Comm, config: EagerConfig | ZeroConfig, tokenizer: VQGANConfig = CONFIG):
    """Losses, the checkpoint's buffers, and the engine's."""

    def make() -> VQGAN:
        with rng.scope(0, "init"):
            return VQGAN(tokenizer)

    engine = build_engine(
        "tokenizer",
        make,
        config=config,
        optimizer=AdamWConfig(lr=1e-2),
        schedule=ScheduleConfig(),
        comm=comm,
        micro_batches=1,
        micro_batch_size=BATCH // comm.world,
        total_steps=STEPS,
    )
    rows = slice(comm.rank * BATCH // comm.world, (comm.rank + 1) * BATCH // comm.world)
    pixels = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=rng.generator(0, "pictures"), dtype=torch.uint8)
    batch = ImageBatch(positions=torch.arange(BATCH)[rows], pixels=pixels[rows])
    losses = []
    for step in range(STEPS):
        engine.model.anneal(step)
        out = engine(batch)
        engine.backward(out.total)
        engine.step(step)
        losses.append(comm.mean({"loss": out.total.item()})["loss"])
    held = dict(engine.model.quantizer.named_buffers())
    saved = {name: value for (name, slot), value in snapshot(engine, comm).whole().items() if slot == "buffer"}
    return losses, saved, {name: buffer.clone() for name, buffer in held.items()}


def divided(comm: Comm):
    bf16 = DIVIDED.model_copy(update={"dtype": "bf16"})
    return train(comm, DIVIDED), train(comm, bf16), train(comm, DIVIDED, MOVED)


def test_global_statistics_make_two_ranks_one():
    alone, saved, held = train(Comm(ProcessEnv()), EagerConfig())
    ranks = run_ranks(divided, 2)
    (losses, parts, own), (half_losses, half_saved, half_own), (moved, *_) = ranks[0]
    assert alone[-1] < 0.9 * alone[0]
    assert losses[0] == pytest.approx(alone[0], rel=1e-6) and losses == pytest.approx(alone, rel=1e-4)
    for name in ("codebook", "ema_count", "ema_sum"):
        torch.testing.assert_close(own[name], held[name], atol=1e-4, rtol=1e-3)
        # Buffers are saved whole, and are the same on every rank, to the last bit; in bf16 they stay fp32.
        assert torch.equal(parts[f"quantizer.{name}"], own[name]) and torch.equal(own[name], ranks[1][0][2][name])
        assert half_own[name].dtype == torch.float32 and torch.equal(half_own[name], ranks[1][1][2][name])
        assert torch.equal(half_saved[f"quantizer.{name}"], half_own[name])
    assert half_losses[-1] < 0.9 * half_losses[0]
    assert saved.keys() == parts.keys()
    # Entries that a loss moves are a parameter, which the backward pass reads: it has to be whole again by then.
    alone_moved, *_ = train(Comm(ProcessEnv()), EagerConfig(), MOVED)
    assert moved == pytest.approx(alone_moved, rel=1e-4) and moved[-1] < 0.9 * moved[0]
