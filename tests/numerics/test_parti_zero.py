"""Parti under ZeRO-3 with every parameter divided, on two real ranks, against one plain process."""

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.protocols import Engine
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdafactorConfig, AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.models.parti import Parti, PartiConfig, PartiSampling

STEPS, SIZE = 6, 8
CAPTION = {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}
PAPER = {"condition": CAPTION, "rel_pos_bias": False, "multi_query": False, "attn_types": ("conv_like", "full")}
CASES = {
    "seed": {"condition": {"kind": "embeddings", "width": 12}},
    "seed_tied_remat": {"condition": CAPTION, "kv_tied": True, "rel_pos_index": "sequence", "remat": "block"},
    "paper": PAPER | {"kernel_size": 3, "ff_norm": False, "sandwich_norm": True},
    "paper_adafactor": PAPER | {"remat": "block"},
}
Run = tuple[list[float], torch.Tensor]


def make(case: str) -> Parti:
    sizes = {"num_text_tokens": 11, "max_text_len": 5, "num_image_tokens": 13, "image_grid": (3, 4)}
    with rng.scope(0, "model"):
        return Parti(PartiConfig(**{"dim": 16, "depth": 2, "heads": 2, "dim_head": 8} | sizes | CASES[case]))


def batch(step: int) -> TokenBatch:
    text = torch.randint(1, 4, (SIZE, 5), generator=rng.generator(0, "text"))
    states = torch.nn.functional.one_hot(text, 12).float()
    codes = (text.sum(1)[:, None, None] + torch.arange(12).view(3, 4)) % 13
    positions = torch.arange(step * SIZE, (step + 1) * SIZE)
    return TokenBatch(positions, text, text != 0, codes, extra={TEXT_EMBEDS: states, TEXT_EMBEDS_MASK: text != 0})


def build(comm: Comm, case: str, dtype: str = "fp32") -> Engine:
    zero = ZeroConfig(stage=3, param_persistence_threshold=0, dtype=dtype)
    adafactor = AdafactorConfig(lr=1e-2, min_factor=8)
    return build_engine(
        "model",
        lambda: make(case),
        config=EagerConfig(dtype=dtype) if comm.world == 1 else zero,
        optimizer=adafactor if case.endswith("adafactor") else AdamWConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=2,
        micro_batch_size=SIZE // comm.world // 2,
        total_steps=STEPS,
    )


def trained(comm: Comm, case: str, dtype: str = "fp32") -> Run:
    """Losses of a few steps over two micro batches, and codes that the trained model samples on every rank."""
    engine, losses = build(comm, case, dtype), []
    for step in range(STEPS):
        total = 0.0
        for micro in batch(step).split(comm.world)[comm.rank].split(2):
            out = engine(micro)
            engine.backward(out.total)
            total += out.total.item() / 2
        assert engine.step(step).applied
        losses.append(comm.mean({"loss": total})["loss"])
    some = batch(0)
    with engine.gathered() as model:
        how = PartiSampling(cond_scale=2.0, filter_thres=0.5)
        codes = model.generate_codes(some.text, some.text_mask, options=how, seeds=list(range(SIZE)), extra=some.extra)
    return losses, codes


def every_case(comm: Comm) -> dict[str, Run]:
    low = {} if comm.world == 1 else {f"{case}_bf16": trained(comm, case, "bf16") for case in ("seed", "paper")}
    return {case: trained(comm, case) for case in CASES} | low


@pytest.fixture(scope="module")
def eager() -> dict[str, Run]:
    return run_ranks(every_case, 1)[0]


@pytest.fixture(scope="module")
def divided() -> list[dict[str, Run]]:
    return run_ranks(every_case, 2)


@pytest.mark.parametrize("case", CASES)
def test_losses_under_zero3_equal_one_process(case, eager, divided):
    wanted, _ = eager[case]
    assert wanted[-1] < 0.95 * wanted[0], "a loss that does not fall would hide a dead step"
    for rank in divided:
        losses, _ = rank[case]
        assert losses[0] == pytest.approx(wanted[0], rel=1e-6)
        assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_sampling_inside_training_is_the_same_on_every_rank(case, eager, divided):
    first, second = (rank[case][1] for rank in divided)
    assert torch.equal(first, second)
    assert (first == eager[case][1]).float().mean() >= 0.99


@pytest.mark.parametrize("case", ["seed", "paper"])
def test_z2_bfloat16_trains_under_zero3(case, eager, divided):
    wanted, _ = eager[case]
    for rank in divided:
        losses, _ = rank[f"{case}_bf16"]
        assert losses[-1] < 0.95 * losses[0]
        assert losses[0] == pytest.approx(wanted[0], rel=2e-2)
