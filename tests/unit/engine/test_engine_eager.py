"""The eager engine against a hand-written training loop, and what it does with bad numbers."""

import itertools

import pytest
import torch

from tokscale.base.config import decode
from tokscale.base.errors import CheckpointError
from tokscale.base.state import TensorShard
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine import build
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, OptimizerConfig, ScheduleConfig
from tokscale.engine.optimizer import OPTIMIZERS
from tokscale.engine.testing import MemorySource, snapshot, toy, toy_batch, train
from tokscale.engine.verdict import Verdict

COMM = Comm(ProcessEnv(), device=torch.device("cpu"))


def engine(*, seed=0, micro_batches=1, lr=1e-2, weight_decay=0.1, schedule="constant", optimizer=None, **options):
    return build_engine(
        "toy",
        toy(seed),
        config=EagerConfig(**options),
        optimizer=optimizer or AdamWConfig(lr=lr, weight_decay=weight_decay),
        schedule=ScheduleConfig(kind=schedule),
        comm=COMM,
        micro_batches=micro_batches,
        micro_batch_size=8 // micro_batches,
        total_steps=20,
    )


def weights(any_engine):
    return {name: value.detach().clone() for name, value in any_engine.model.state_dict().items()}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_equals_a_loop_written_by_hand(clip):
    subject = engine(gradient_clipping=clip, schedule="linear")
    losses, reports = train(subject, COMM, range(20))

    model = toy()()
    spared = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    decayed = [p for n, p in model.named_parameters() if not (p.ndim < 2 or "embed" in n) and p.requires_grad]
    plain = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [p for p in spared if p.requires_grad], "weight_decay": 0},
        ],
        lr=1e-2,
        betas=(0.9, 0.96),
    )
    for step in range(20):
        for group in plain.param_groups:
            group["lr"] = 1e-2 * (1 - step / 19)
        loss = model(toy_batch(step, 8)).total
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
        plain.step()
        plain.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-6)
        assert reports[step].grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert reports[step].lr == pytest.approx(1e-2 * (1 - step / 19))
    assert clip == 0 or reports[0].grad_norm > 10 * clip  # clipping was at work
    assert losses[-1] < 0.9 * losses[0]


def test_a_gradient_below_the_limit_is_left_as_it_is():
    verdict = Verdict(torch.tensor(0.5, dtype=torch.float64), torch.zeros(()))
    assert verdict.grad_scale(1.0) == 1 and verdict.grad_scale(0.0) is None
    assert verdict.grad_scale(0.25).item() == pytest.approx(2, rel=1e-5)


def test_accumulation_equals_one_large_batch():
    whole, _ = train(engine(), COMM, range(8))
    parts, _ = train(engine(micro_batches=4), COMM, range(8), micro_batches=4)
    assert parts == pytest.approx(whole, rel=1e-5)


def test_bf16_keeps_fp32_weights_and_learns():
    subject = engine(dtype="bf16")
    losses, _ = train(subject, COMM, range(20))
    exact, _ = train(engine(), COMM, range(20))
    assert losses[-1] < 0.9 * losses[0]
    assert losses != exact and losses == pytest.approx(exact, rel=0.05)
    assert all(shard.data.dtype == torch.float32 for shard in subject.shards())


@pytest.mark.parametrize(("native", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_only_where_it_is_computed_natively(monkeypatch, native, dtype):
    monkeypatch.setattr(build, "computes_bf16", lambda device: native)
    subject = engine(dtype="auto")
    assert subject.dtype == dtype
    assert train(subject, COMM, range(3))[0] == train(engine(dtype=dtype), COMM, range(3))[0]


def test_a_cpu_computes_bf16_exactly_where_its_library_does():
    told = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert build.computes_bf16(torch.device("cpu")) is told


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_non_finite_step_changes_no_bit_of_any_optimizer(poison, kind):
    asked = decode(OptimizerConfig, {"kind": kind, "lr": 1e-2, "weight_decay": 0.1})
    subject = engine(ema=(0.9,), optimizer=asked)
    train(subject, COMM, range(3))
    before = snapshot(subject, COMM)
    loss = subject(toy_batch(3, 8)).total
    if poison == "loss":
        subject.backward(loss + torch.inf)
    else:
        subject.backward(loss)
        subject.model.blocks[0][0].bias.grad[0] = torch.nan
    report = subject.step(3)
    assert not report.applied
    after = snapshot(subject, COMM)
    assert all(torch.equal(value, after.whole()[key]) for key, value in before.whole().items())
    assert subject.scalars()["updates"] == 3 and _counts(subject) == {3}
    assert (subject.updates, subject.skipped) == (3, 1)
    assert train(subject, COMM, [4])[1][0].applied  # and the poison is gone


def _counts(subject):
    """How many updates the optimizer believes that it made, by each parameter."""
    return {int(state["step"]) for state in subject.optimizer.state.values()}


def test_the_number_of_micro_batches_is_checked():
    subject = engine(micro_batches=2)
    with pytest.raises(RuntimeError, match="2 micro batches; got only 0"):
        subject.step(0)
    for _ in range(2):
        subject.backward(subject(toy_batch(0, 4)).total)
    with pytest.raises(RuntimeError, match="2 micro batches; got one more"):
        subject.backward(subject(toy_batch(0, 4)).total)


def test_a_resumed_run_is_bit_equal():
    straight, _ = train(engine(ema=(0.99, 0.5)), COMM, range(10))
    first = engine(ema=(0.99, 0.5))
    train(first, COMM, range(4))
    second = engine(seed=1, ema=(0.99, 0.5), weight_decay=0.7)
    second.load(snapshot(first, COMM))
    assert second.scalars() == first.scalars()
    resumed, _ = train(second, COMM, range(4, 10))
    assert resumed == straight[4:]


def test_every_kind_of_state_is_saved_once():
    stored = snapshot(engine(ema=(0.99,)), COMM)
    assert stored.slots("embed.weight") == ("weight", "exp_avg", "exp_avg_sq", "ema/0.99")
    assert stored.slots("frozen.weight") == ("frozen",)
    assert stored.slots("scale") == ("buffer",)
    assert "head.weight" not in stored.names() and "shift" not in stored.names()


def test_averages_follow_the_weights():
    subject = engine(ema=(0.9, 0.2))
    expected = {decay: weights(subject)["embed.weight"] for decay in (0.9, 0.2)}
    for step in range(5):
        train(subject, COMM, [step])
        for decay, value in expected.items():
            ramped = min(decay, (2 + step) / (11 + step))
            expected[decay] = ramped * value + (1 - ramped) * weights(subject)["embed.weight"]
    stored = snapshot(subject, COMM).whole()
    for decay, value in expected.items():
        torch.testing.assert_close(stored["embed.weight", f"ema/{decay}"], value)


def test_an_average_added_later_starts_from_the_weights():
    first = engine()
    train(first, COMM, range(3))
    second = engine(ema=(0.5,))
    second.load(snapshot(first, COMM))
    stored = snapshot(second, COMM).whole()
    assert torch.equal(stored["embed.weight", "ema/0.5"], stored["embed.weight", "weight"])


def damaged(change):
    shards = [TensorShard(s.name, s.slot, s.shape, s.start, s.data.clone()) for s in engine().shards()]
    return MemorySource(list(itertools.chain.from_iterable(change(s) for s in shards)), dict(engine().scalars()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: [] if s.name == "scale" else [s],
            r"of another model: 1 tensors are missing from it \(first \['scale",
        ),
        (lambda s: [] if s.slot == "exp_avg" else [s], "has weight, exp_avg_sq, but this run needs 'exp_avg'"),
        (
            lambda s: [TensorShard(s.name, s.slot, (*s.shape[::-1],), s.start, s.data)],
            r"blocks.0.0.weight \(weight\): shape \(15, 30\) in the checkpoint, \(30, 15\) in the model",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(change, message):
    subject = engine(seed=1)
    before = weights(subject)
    with pytest.raises(CheckpointError, match=message):
        subject.load(damaged(change))
    assert all(torch.equal(value, before[key]) for key, value in weights(subject).items())


def test_gathered_gives_the_model():
    subject = engine()
    with subject.gathered() as model:
        assert model is subject.model and model.embed.weight.shape == (23, 15)
