"""DeepSpeed's own universal checkpoint of the same state holds the same numbers: a second opinion on our layout."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import toy, train


def save_both(comm: Comm, folder: Path) -> None:
    engine = build_engine(
        "model",
        toy(),
        config=ZeroConfig(stage=3, param_persistence_threshold=0),
        optimizer=AdamWConfig(lr=0.05),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=2,
        total_steps=4,
    )
    train(engine, comm, range(3), batch=4)
    CheckpointStore(folder / "ours", CheckpointConfig(), comm).save(3, {"model": engine}, {})
    engine._deepspeed.save_checkpoint(str(folder / "theirs"), tag="x")


@pytest.mark.long
def test_deepspeeds_universal_checkpoint_agrees(tmp_path):
    run_ranks(save_both, 2, tmp_path)
    convert = ["-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    folders = ["--input_folder", str(tmp_path / "theirs" / "x"), "--output_folder", str(tmp_path / "theirs" / "u")]
    subprocess.run([sys.executable, *convert, *folders], check=True, capture_output=True, text=True, timeout=300)
    compared = 0
    with Checkpoint(tmp_path / "ours" / "step_000000003").source("model") as source:
        for name in source.names():
            for slot, file in (("weight", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
                if slot not in source.slots(name):
                    continue  # frozen parameters and buffers, which the universal checkpoint does not hold
                stored = torch.load(tmp_path / "theirs" / "u" / "zero" / name / f"{file}.pt", weights_only=True)
                theirs = stored["param"] if isinstance(stored, dict) else stored
                assert torch.equal(source.read(name, slot, 0, theirs.numel()), theirs.flatten()), (name, slot)
                compared += 1
    assert compared == 3 * 15
