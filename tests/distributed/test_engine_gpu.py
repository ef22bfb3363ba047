"""ZeRO on one CUDA device against the eager engine there."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import toy, train

comm = Comm(ProcessEnv())
assert comm.device.type == "cuda"


def losses(config):
    engine = build_engine(
        "toy", toy(), config=config, optimizer=AdamWConfig(lr=1e-2), schedule=ScheduleConfig(kind="constant"),
        comm=comm, micro_batches=2, micro_batch_size=4, total_steps=20,
    )
    return torch.tensor(train(engine, comm, range(20), micro_batches=2)[0])


for dtype, tolerance in (("fp32", 1e-4), ("bf16", 2e-2)):
    exact = losses(EagerConfig(dtype=dtype))
    assert exact[-1] < 0.9 * exact[0]
    for stage in range(4):
        for offload in (False, True) if stage else (False,):
            for overlap in (False, True):
                config = ZeroConfig(stage=stage, dtype=dtype, offload_optimizer=offload, overlap_comm=overlap)
                torch.testing.assert_close(losses(config), exact, rtol=tolerance, atol=0, msg=str(config))
"""


@pytest.mark.gpu
def test_zero_follows_eager_on_a_gpu():
    # A process of its own: DeepSpeed binds to one kind of device when it is first imported.
    environ = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
