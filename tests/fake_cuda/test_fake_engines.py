"""Whole training steps through an engine on a CUDA device that is not there: forward, backward, message and update.

DeepSpeed needs a device of its own; what is ours of its step (verdict, message, optimizers, averages) is the same here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from allowed import check
from ledger import DEVICE, Ledger, forget_tables, to_cuda
from model_cases import BATCH, base, tokens

from tokscale.base.batch import Batch, ImageBatch
from tokscale.base.config import decode
from tokscale.base.protocols import TrainTask
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig
from tokscale.engine.optimizer import OPTIMIZERS, config_of
from tokscale.evaluation.measures import mean_losses
from tokscale.models.registry import build_model
from tokscale.stages.tokenizer_training import tokenizer_task
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.train.held_out import HeldOutConfig, HeldOutLoss
from tokscale.train.task import SingleModelTask

pytestmark = pytest.mark.usefixtures("cuda", "moved_as_fakes")

ENGINE: dict[str, Any] = {"compile": False, "gradient_clipping": 1.0, "ema": (0.9, 0.99)}
PARTS, STEPS = 2, 2
VQGAN = decode(
    VQGANConfig,
    {
        "image_size": 16,
        "network": {"kind": "resnet", "dim": 8, "layers": 2},
        "quantizer": {"kind": "vq", "num_tokens": 16, "dim": 4},
        "adversarial": {"dim": 8, "layers": 1, "start_step": 0},
    },
)


@pytest.fixture
def moved_as_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: to_cuda(module))


def engine(name: str, make: Callable[[], torch.nn.Module], optimizer: Any, dtype: Any, comm: Comm) -> Any:
    """As a stage builds it, with everything on that a step can have."""
    built: Any = build_engine(
        name,
        make,
        config=EagerConfig(dtype=dtype, **ENGINE),
        optimizer=optimizer,
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=PARTS,
        micro_batch_size=BATCH // PARTS,
        total_steps=STEPS,
    )
    built.gradient_group = lambda parameter: parameter.split(".")[0]
    return built


def trained(task: TrainTask, batch: Batch) -> None:
    """Take steps, and look at none of them."""
    for step in range(STEPS):
        with Ledger() as ledger:
            for each in task.engines.values():
                each.carry({"loop/stop": 0.0, "loop/own": [1.0, 2.0]})
            task.step(batch, step)
        check(ledger, f"step {step}")


@pytest.mark.parametrize(("optimizer", "dtype"), [*((name, "bf16") for name in OPTIMIZERS), ("adamw", "fp32")])
def test_a_step_waits_for_nothing_with_any_optimizer(optimizer: str, dtype: str) -> None:
    forget_tables()
    config, comm = base("dalle"), Comm(ProcessEnv(), device=DEVICE)
    options = config_of(OPTIMIZERS[optimizer])()
    trained(SingleModelTask(engine("model", lambda: build_model(config), options, dtype, comm), PARTS), tokens(config))


@pytest.mark.parametrize("kind", ["maskgit", "parti"])
def test_a_step_of_another_family_waits_for_nothing(kind: str) -> None:
    forget_tables()
    config, comm = base(kind), Comm(ProcessEnv(), device=DEVICE)
    task = SingleModelTask(engine("model", lambda: build_model(config), AdamWConfig(), "bf16", comm), PARTS)
    trained(task, tokens(config))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_task_of_two_engines_waits_for_nothing(dtype: str) -> None:
    forget_tables()
    comm = Comm(ProcessEnv(), device=DEVICE)
    task = tokenizer_task(VQGAN, lambda name, make: engine(name, make, AdamWConfig(), dtype, comm), comm, PARTS)
    pixels = torch.zeros(BATCH, 3, 16, 16, dtype=torch.uint8, device=DEVICE)
    trained(task, ImageBatch(torch.zeros(BATCH, dtype=torch.int64, device=DEVICE), pixels))


def test_measuring_a_loss_waits_once_for_all_batches() -> None:
    forget_tables()
    config, comm = base("dalle"), Comm(ProcessEnv(), device=DEVICE)
    built = engine("model", lambda: build_model(config), AdamWConfig(), "bf16", comm)
    batch: Any = tokens(config)
    hook = HeldOutLoss(HeldOutConfig(), built, [lambda: batch] * 3, comm=comm, total_steps=STEPS, seed=0)
    counts = []
    for measure in (hook._losses, lambda: mean_losses(built.model, [batch] * 3)):
        with Ledger() as ledger:
            found = measure()
        counts.append((len(found), sum(ledger.reads.values())))
    assert all(names == reads for names, reads in counts), f"numbers and reads: {counts}"
