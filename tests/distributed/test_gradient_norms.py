"""The norm of the gradient by group of parameters is the same however the state is divided."""

import pytest

from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.common import CommonEngine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import toy, toy_batch

CONFIGS = {
    "eager": EagerConfig(),
    **{f"zero{stage}": ZeroConfig(stage=stage, param_persistence_threshold=0) for stage in (0, 1, 2, 3)},
    "offloaded": ZeroConfig(stage=3, param_persistence_threshold=0, offload_optimizer=True),
}


def norms(comm: Comm) -> dict[str, tuple[dict[str, float], float]]:
    found = {}
    for name, config in CONFIGS.items():
        engine = build_engine(
            "model",
            toy(0, dim=12),
            config=config,
            optimizer=AdamWConfig(lr=1e-3),
            schedule=ScheduleConfig(kind="constant"),
            comm=comm,
            micro_batches=2,
            micro_batch_size=3,
            total_steps=4,
        )
        assert isinstance(engine, CommonEngine) and engine.gradient_norms == {}
        engine.gradient_group = lambda parameter: parameter.rpartition(".")[0] or parameter
        for step in range(2):
            for part in range(2):
                engine.backward(engine(toy_batch(10 * step + 2 * part + comm.rank, 3)).total)
            norm = engine.step(step).grad_norm
        found[name] = engine.gradient_norms, norm
    return found


def test_norms_by_group_are_those_of_the_eager_engine():
    for found in run_ranks(norms, 2, imports=("deepspeed",)):
        expected, whole = found["eager"]
        assert len(expected) > 2 and sum(norm**2 for norm in expected.values()) == pytest.approx(whole**2, rel=1e-6)
        for name, (mine, _) in found.items():
            assert mine == pytest.approx(expected, rel=1e-4), name
