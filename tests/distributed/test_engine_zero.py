"""ZeRO at every stage against the eager engine, with real ranks, on losses that fall."""

import dataclasses
import itertools

import pytest
import torch

from tokscale.base.batch import LossOutput
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import ParameterAccess, current
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.testing import ToyModel, snapshot, toy, toy_batch, train

STEPS = 20
CLIP = 0.5
"""Below the gradient norms of the toy task, so that clipping is at work."""


@dataclasses.dataclass(frozen=True)
class Case:
    stage: int
    dtype: str = "fp32"
    micro_batches: int = 1
    bucket: int | str = "auto"
    threshold: int = 0
    clip: float = CLIP
    offload: bool = False
    sharded_init: bool = False

    def config(self) -> ZeroConfig:
        return ZeroConfig(
            stage=self.stage,
            dtype=self.dtype,
            gradient_clipping=self.clip,
            reduce_bucket_size=self.bucket,
            param_persistence_threshold=self.threshold,
            offload_optimizer=self.offload,
            sharded_init=self.sharded_init,
        )


PAIRWISE = [
    Case(0, micro_batches=2),
    Case(0, dtype="bf16", clip=0.0),
    Case(1, bucket=100, clip=0.0),
    Case(1, dtype="bf16", micro_batches=2),
    Case(1, offload=True),
    Case(2, micro_batches=2, bucket=100),
    Case(2, dtype="bf16"),
    Case(2, offload=True, micro_batches=2),
    Case(3, bucket=100, micro_batches=2),
    Case(3, threshold=100_000, clip=0.0),
    Case(3, dtype="bf16", micro_batches=2),
    Case(3, offload=True, bucket=100),
    Case(3, sharded_init=True),
    Case(3, dtype="bf16", sharded_init=True, threshold=200),
]
GRID = [
    Case(stage, dtype, micro, bucket, threshold, clip, offload)
    for stage, dtype, micro, bucket, clip in itertools.product(
        range(4), ("fp32", "bf16"), (1, 2), (100, "auto"), (0.0, CLIP)
    )
    for threshold in ((0, 100_000) if stage == 3 else (0,))
    for offload in ((False, True) if stage else (False,))
]


def build(comm, config, make_model, micro_batches=1):
    return build_engine(
        "toy",
        make_model,
        config=config,
        optimizer=AdamWConfig(lr=1e-2, weight_decay=0.1),
        schedule=ScheduleConfig(kind="linear", warmup_steps=3),
        comm=comm,
        micro_batches=micro_batches,
        micro_batch_size=8 // micro_batches // comm.world,
        total_steps=STEPS,
    )


def trajectories(comm, cases):
    found = []
    for case in cases:
        losses, reports = train(
            build(comm, case.config(), toy(), case.micro_batches), comm, range(STEPS), micro_batches=case.micro_batches
        )
        found.append((losses, [report.grad_norm for report in reports], [report.lr for report in reports]))
    return found


def oracle(case):
    comm = Comm(ProcessEnv(), device=torch.device("cpu"))
    config = EagerConfig(dtype=case.dtype, gradient_clipping=case.clip)
    subject = build(comm, config, toy(), case.micro_batches)
    losses, reports = train(subject, comm, range(STEPS), micro_batches=case.micro_batches)
    return losses, [report.grad_norm for report in reports], [report.lr for report in reports]


def assert_agrees(found, expected, case):
    losses, norms, rates = found
    exact_losses, exact_norms, exact_rates = expected
    assert rates == exact_rates
    assert exact_losses[-1] < 0.9 * exact_losses[0]
    assert min(exact_norms) > CLIP / 2 and max(exact_norms) > 2 * CLIP
    first, rest = (1e-6, 1e-5) if case.dtype == "fp32" else (1e-3, 1e-2)
    assert losses[0] == pytest.approx(exact_losses[0], rel=first)
    assert losses == pytest.approx(exact_losses, rel=rest)
    assert norms == pytest.approx(exact_norms, rel=1e-5 if case.dtype == "fp32" else 3e-2)


@pytest.mark.parametrize("world", [1, 2])
def test_zero_follows_eager(world):
    cases = PAIRWISE if world == 2 else PAIRWISE[::3]
    results = run_ranks(trajectories, world, cases)
    assert all(rank == results[0] for rank in results)
    for case, found in zip(cases, results[0], strict=True):
        assert_agrees(found, oracle(case), case)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_zero_follows_eager_everywhere(world):
    for case, found in zip(GRID, run_ranks(trajectories, world, GRID, timeout=1800)[0], strict=True):
        assert_agrees(found, oracle(case), case)


class Occasional(ToyModel):
    """One parameter takes part in every second step only."""

    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(15, 15)

    def forward(self, batch):
        output = super().forward(batch)
        if (batch.positions[0].item() // 8) % 2 == 0:
            nudge = self.extra(self.embed(batch.ids)).square().mean()
            return LossOutput(total=output.total + nudge, parts=output.parts, metrics={"nudge": nudge.detach()})
        return output


def occasional():
    torch.manual_seed(0)
    return Occasional()


def with_unused_parameters(comm):
    engines = [EagerConfig(), *(ZeroConfig(stage=stage, param_persistence_threshold=0) for stage in range(4))]
    engines += [ZeroConfig(stage=stage, offload_optimizer=True) for stage in (1, 2, 3)]
    return [train(build(comm, config, occasional, 2), comm, range(6), micro_batches=2)[0] for config in engines]


def test_parameters_that_a_step_does_not_use_get_no_stale_gradient():
    eager, *zero = run_ranks(with_unused_parameters, 2)[0]
    for losses in zero:
        assert losses == pytest.approx(eager, rel=1e-6)


def poisoned(comm, stage, poison):
    subject = build(comm, ZeroConfig(stage=stage, param_persistence_threshold=0, ema=(0.9,)), toy(), 2)
    train(subject, comm, [0, 1], micro_batches=2)
    before = snapshot(subject, comm).whole()
    for micro in toy_batch(2, 8).split(comm.world)[comm.rank].split(2):
        output = subject(micro)
        if comm.rank == 1:  # on one rank only
            poisonous = torch.tensor(torch.inf)
            if poison == "gradient":
                output.total.register_hook(lambda grad: grad * torch.nan)
            else:
                output = dataclasses.replace(output, total=output.total + poisonous)
        subject.backward(output.total)
    report = subject.step(2)
    after = snapshot(subject, comm).whole()
    same = all(torch.equal(value, after[key]) for key, value in before.items())
    losses, later = train(subject, comm, [3, 4], micro_batches=2)
    return report.applied, same, subject.updates, subject.skipped, losses, [r.applied for r in later]


def poisons(comm):
    plain = build(comm, EagerConfig(), toy(), 2)
    train(plain, comm, [0, 1], micro_batches=2)
    expected, _ = train(plain, comm, [3, 4], micro_batches=2)
    return expected, [poisoned(comm, stage, poison) for stage in range(4) for poison in ("loss", "gradient")]


def test_a_non_finite_value_on_one_rank_changes_nothing_on_any():
    for expected, results in run_ranks(poisons, 2):
        for applied, same, updates, skipped, losses, later in results:
            assert (applied, same, updates, skipped) == (False, True, 4, 1)
            assert later == [True, True] and losses == pytest.approx(expected, rel=1e-5)


def outputs(comm):
    found = []
    for stage in (1, 3):
        subject = build(comm, ZeroConfig(stage=stage, param_persistence_threshold=0), toy())
        train(subject, comm, [0, 1])
        batch = toy_batch(9, 4)
        with subject.access.gathered([subject.model.embed.weight]):
            looked_up = tuple(subject.model.embed.weight.shape)
        with subject.gathered() as model, torch.no_grad(), current(ParameterAccess).gathered(model.parameters()):
            shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            inside = model(batch)
            hidden = model.blocks[0](model.embed(batch.ids))  # any method, outside the engine's forward
        later = subject(batch)
        after, _ = train(subject, comm, [2, 3])
        undisturbed = build(comm, ZeroConfig(stage=stage, param_persistence_threshold=0), toy())
        straight, _ = train(undisturbed, comm, range(4))
        found.append(
            (
                looked_up,
                shapes,
                inside.total.item(),
                later.total.item(),
                [*later.parts],
                hidden.shape,
                after,
                straight[2:],
            )
        )
    return found


def test_gathered_gives_whole_parameters_and_leaves_no_trace():
    for looked_up, shapes, inside, later, parts, hidden, after, straight in run_ranks(outputs, 2)[0]:
        assert looked_up == (23, 15)
        assert shapes == {name: tuple(p.shape) for name, p in ToyModel().named_parameters()}
        assert inside == later and parts == ["token"] and hidden == (4, 5, 15)
        assert after == straight


class Fussy(ToyModel):
    """Initialises a child's weight, which by then is divided; its hidden buffer needs fp32."""

    def __init__(self, late):
        super().__init__()
        self.register_buffer("angles", torch.arange(5) * 8191.123, persistent=False)
        if late == "init":
            torch.nn.init.normal_(self.embed.weight)
        if late == "data":
            self.blocks[0][0].bias.data.zero_()


def sharded(comm):
    config = ZeroConfig(stage=3, dtype="bf16", sharded_init=True, param_persistence_threshold=0)
    fine = build(comm, config, lambda: Fussy(None))
    messages = []
    for late in ("init", "data"):
        try:
            build(comm, config, lambda late=late: Fussy(late))
        except ConfigError as error:
            messages.append(str(error))
    return fine.model.angles, fine.model.scale.dtype, messages


def test_sharded_init_keeps_buffers_fp32_and_refuses_lost_writes():
    angles, dtype, messages = run_ranks(sharded, 2)[0]
    assert torch.equal(angles, torch.arange(5) * 8191.123) and dtype == torch.float32
    assert "calls normal_() on a parameter that is divided already" in messages[0]
    assert "calls zero_() on a parameter" in messages[1]
