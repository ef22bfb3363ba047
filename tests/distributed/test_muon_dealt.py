"""Muon on divided masters: each matrix is made orthogonal once, on one rank, and the run is the eager one's."""

import pytest

from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.engine import muon
from tokscale.engine.build import build_engine
from tokscale.engine.config import EagerConfig, MuonConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.deal import dealt
from tokscale.engine.testing import toy, train

STEPS, BATCH = 4, 6


def run(comm: Comm, config) -> tuple[list[float], list[tuple[int, ...]]]:
    """Losses, and the matrices that this rank made orthogonal in the last step."""
    engine = build_engine(
        "toy",
        toy(),
        config=config,
        optimizer=MuonConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=BATCH // comm.world,
        total_steps=STEPS,
    )
    losses = train(engine, comm, range(STEPS - 1), batch=BATCH)[0]
    done: list[tuple[int, ...]] = []
    plain = muon.orthogonal
    muon.orthogonal = lambda matrix: done.append(tuple(matrix.shape)) or plain(matrix)
    losses += train(engine, comm, [STEPS - 1], batch=BATCH)[0]
    muon.orthogonal = plain
    return losses, done


def both_stages(comm: Comm):
    return [run(comm, ZeroConfig(stage=stage, param_persistence_threshold=0)) for stage in (1, 3)]


def test_each_matrix_is_computed_once_and_the_run_is_the_same():
    eager, matrices = run(Comm(ProcessEnv()), EagerConfig())
    ranks = run_ranks(both_stages, 3, fork=True, imports=("deepspeed",))
    assert eager[-1] < eager[0]
    for stage in range(2):
        assert all(rank[stage][0] == pytest.approx(eager, rel=1e-5) for rank in ranks)
        done = [rank[stage][1] for rank in ranks]
        assert sorted(shape for mine in done for shape in mine) == sorted(matrices)
        assert max(len(mine) for mine in done) < len(matrices)


def test_the_work_is_dealt_evenly():
    shapes = [(64, 64)] * 9 + [(128, 64)] * 3 + [(8, 8)]
    owners = dealt(shapes, 3)
    assert [owners[:9].count(rank) for rank in range(3)] == [3, 3, 3] and sorted(owners[9:12]) == [0, 1, 2]
    assert dealt(shapes, 3) == owners and set(dealt(shapes[:2], 8)) == {0, 1}
