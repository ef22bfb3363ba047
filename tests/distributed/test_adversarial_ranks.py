"""A VQGAN with its discriminator on two ranks: ZeRO-3 against the eager engine, saved, and taken up again."""

from pathlib import Path

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import ImageBatch
from tokscale.base.config import decode
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.stages.tokenizer_training import DISCRIMINATOR, tokenizer_task
from tokscale.stages.train import seeded
from tokscale.tokenizers.vqgan.config import VQGANConfig

CONFIG = decode(
    VQGANConfig,
    {
        "image_size": 16,
        "network": {"kind": "resnet", "dim": 8, "layers": 2},
        "quantizer": {"kind": "vq", "num_tokens": 16, "dim": 4, "decay": 0.9, "revive_every": 4},
        "adversarial": {
            "dim": 8,
            "layers": 2,
            "weight": 0.2,
            "start_step": 2,
            "gradient_penalty_weight": 1.0,
            "gradient_penalty_every": 3,
        },
    },
)
STEPS, BATCH = 12, 8
ZERO = ZeroConfig(stage=3, sharded_init=True, param_persistence_threshold=0)


def build(comm: Comm, engine: EagerConfig | ZeroConfig):
    def make(name, make_model):
        return build_engine(
            name,
            seeded(make_model, 0, name),
            config=engine.with_whole_weights() if name == DISCRIMINATOR else engine,
            optimizer=AdamWConfig(lr=1e-2),
            schedule=ScheduleConfig(),
            comm=comm,
            micro_batches=1,
            micro_batch_size=BATCH // comm.world,
            total_steps=STEPS,
        )

    return tokenizer_task(CONFIG, make, comm, 1)


def train(comm: Comm, task, steps) -> list[dict[str, float]]:
    rows = slice(comm.rank * BATCH // comm.world, (comm.rank + 1) * BATCH // comm.world)
    pixels = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=rng.generator(0, "pictures"), dtype=torch.uint8)
    batch = ImageBatch(positions=torch.arange(BATCH)[rows], pixels=pixels[rows])
    return [comm.mean(task.step(batch, step).metrics) for step in steps]


def state(task) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{shard.name}/{shard.slot}": shard.data.clone()
        for name, engine in task.engines.items()
        for shard in engine.shards()
    }


def all_ways(comm: Comm, folder: str):
    plain = train(comm, build(comm, EagerConfig()), range(STEPS))
    divided_task = build(comm, ZERO)
    divided = train(comm, divided_task, range(STEPS))
    interrupted = build(comm, ZERO)
    with CheckpointStore(Path(folder), CheckpointConfig(), comm) as store:
        train(comm, interrupted, range(6))
        store.save(6, interrupted.engines, {})
    resumed = build(comm, ZERO)
    checkpoint = CheckpointStore(Path(folder), CheckpointConfig(), comm).newest()
    for name, engine in resumed.engines.items():
        with checkpoint.source(name) as source:
            engine.load(source)
    train(comm, resumed, range(6, STEPS))
    ended, straight = state(resumed), state(divided_task)
    differing = [name for name in straight if not torch.equal(straight[name], ended[name])]
    with divided_task.engines["tokenizer"].gathered() as model:  # on every rank, as the stage does at the end
        codes = model.eval().encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    return plain, divided, sorted(straight) == sorted(ended), differing, codes


def test_zero_3_with_a_discriminator_equals_eager_and_resumes_to_the_bit(tmp_path):
    ranks = run_ranks(all_ways, 2, str(tmp_path))
    for plain, divided, same_names, differing, codes in ranks:
        assert same_names and not differing
        assert torch.equal(codes, ranks[0][4])
        assert plain[-1]["loss/l1"] < 0.9 * plain[0]["loss/l1"]
        judged = "discriminator/loss/discriminator"
        assert plain[-1][judged] < plain[2][judged] and judged not in plain[1]
        for eager, zero in zip(plain, divided, strict=True):
            assert eager.keys() == zero.keys()
        assert divided[2] == pytest.approx(plain[2], rel=1e-3, abs=1e-5)
        losses = [[row["loss/l1"] for row in rows] for rows in (plain, divided)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)
        assert (
            "discriminator/loss/gradient_penalty" in plain[3] and "discriminator/loss/gradient_penalty" not in plain[4]
        )
