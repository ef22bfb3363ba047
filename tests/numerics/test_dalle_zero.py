"""DALL-E under ZeRO-3 with every parameter divided, on two real ranks, against one plain process."""

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.models.dalle import DALLE, DALLEConfig, DALLESampling

STEPS, SIZE = 8, 8
CASES = {
    "mixed": {"attn_types": ("full", "axial_row", "axial_col", "conv_like"), "depth": 4, "null_cond_prob": 0.3},
    "tied": {"share_input_output_emb": True, "rotary_emb": False, "remat": "block"},
    "reversible_shared": {"reversible": True, "depth": 4, "shared_attn_ids": (0, 1), "shared_ff_ids": (0,)},
    "stable": {"stable": True, "sandwich_norm": True, "remat": "regions"},
}


def make(case: str) -> DALLE:
    sizes = {"num_text_tokens": 11, "text_seq_len": 5, "num_image_tokens": 13, "image_grid": (3, 4)}
    with rng.scope(0, "model"):
        return DALLE(DALLEConfig(**{"dim": 16, "depth": 2, "heads": 2, "dim_head": 8} | sizes | CASES[case]))


def batch(step: int, rows: slice = slice(None)) -> TokenBatch:
    text = torch.randint(0, 4, (SIZE, 5), generator=rng.generator(0, "text"))
    codes = (text.sum(1)[:, None, None] + torch.arange(12).view(3, 4)) % 13
    whole = TokenBatch(torch.arange(step * SIZE, (step + 1) * SIZE), text, text != 0, codes)
    return whole._map(lambda value: value[rows])


def trained(comm: Comm, config: EagerConfig | ZeroConfig, case: str) -> tuple[list[float], torch.Tensor]:
    """Losses of a few steps over two micro batches, and codes that the trained model samples on every rank."""
    local = SIZE // comm.world
    engine = build_engine(
        case,
        lambda: make(case),
        config=config,
        optimizer=AdamWConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=2,
        micro_batch_size=local // 2,
        total_steps=STEPS,
    )
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro in batch(step, slice(comm.rank * local, (comm.rank + 1) * local)).split(2):
            out = engine(micro)
            engine.backward(out.total)
            total += out.total.item() / 2
        assert engine.step(step).applied
        losses.append(comm.mean({"loss": total})["loss"])
    some = batch(0)
    with engine.gathered() as model:
        codes = model.generate_codes(
            some.text, some.text_mask, options=DALLESampling(cond_scale=2.0), seeds=list(range(SIZE))
        )
    return losses, codes


def every_case(comm: Comm) -> dict[str, tuple[list[float], torch.Tensor]]:
    config = EagerConfig() if comm.world == 1 else ZeroConfig(stage=3, param_persistence_threshold=0)
    return {case: trained(comm, config, case) for case in CASES}


@pytest.fixture(scope="module")
def eager() -> dict[str, tuple[list[float], torch.Tensor]]:
    return run_ranks(every_case, 1)[0]


@pytest.fixture(scope="module")
def divided() -> list[dict[str, tuple[list[float], torch.Tensor]]]:
    return run_ranks(every_case, 2)


@pytest.mark.parametrize("case", CASES)
def test_z8_losses_under_zero3_equal_one_process(case, eager, divided):
    wanted, _ = eager[case]
    assert wanted[-1] < 0.9 * wanted[0], "a loss that does not fall would hide a dead step"
    for rank in divided:
        losses, _ = rank[case]
        assert losses[0] == pytest.approx(wanted[0], rel=1e-6)
        assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_z5_sampling_inside_training_is_the_same_on_every_rank(case, eager, divided):
    first, second = (rank[case][1] for rank in divided)
    assert torch.equal(first, second)
    assert (first == eager[case][1]).float().mean() >= 0.99
