"""MaskGIT under ZeRO-3 with every parameter divided, on two real ranks, against one plain process."""

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import LOWRES_CODES, TokenBatch
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.models.maskgit import MaskGit, MaskGitConfig, MaskGitSampling

STEPS, SIZE = 6, 8
CASES = {
    "self_cond_and_critic": {"self_cond": True, "self_token_critic": True, "remat": "block", "no_mask_token_prob": 0.2},
    "lowres_and_critic": {
        "lowres": {"image_grid": (2, 2), "layout": "encoder", "depth": 1},
        "token_critic": {"dim": 8, "depth": 1, "heads": 1, "dim_head": 8},
    },
    "critic_afterwards": {
        "self_cond": True,
        "self_token_critic": True,
        "train_only_critic": True,
        "min_masking_rate": 0.95,
    },
}
Run = tuple[list[float], torch.Tensor]


def make(case: str) -> MaskGit:
    sizes = {"num_text_tokens": 11, "text_seq_len": 5, "num_tokens": 13, "image_grid": (3, 4)}
    small = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8}
    told = {"condition": {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}, "cond_drop_prob": 0.3}
    with rng.scope(0, "model"):
        return MaskGit(MaskGitConfig.model_validate(sizes | small | told | CASES[case]))


def batch(step: int) -> TokenBatch:
    text = torch.randint(0, 4, (SIZE, 5), generator=rng.generator(0, "text"))
    codes = (text.sum(1)[:, None, None] + torch.arange(12).view(3, 4)) % 13
    low = (text[:, :4] * 3).view(SIZE, 2, 2)
    positions = torch.arange(step * SIZE, (step + 1) * SIZE)
    return TokenBatch(positions, text, text != 0, codes, extra={LOWRES_CODES: low})


def trained(comm: Comm, case: str) -> Run:
    """Losses of a few steps over two micro batches, and codes that the trained model samples on every rank."""
    engine = build_engine(
        "model",
        lambda: make(case),
        config=EagerConfig() if comm.world == 1 else ZeroConfig(stage=3, param_persistence_threshold=0),
        optimizer=AdamWConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=2,
        micro_batch_size=SIZE // comm.world // 2,
        total_steps=STEPS,
    )
    losses = []
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
        how = MaskGitSampling(timesteps=4)
        codes = model.generate_codes(some.text, some.text_mask, options=how, seeds=list(range(SIZE)), extra=some.extra)
    return losses, codes


def every_case(comm: Comm) -> dict[str, Run]:
    return {case: trained(comm, case) for case in CASES}


@pytest.fixture(scope="module")
def eager() -> dict[str, Run]:
    return run_ranks(every_case, 1)[0]


@pytest.fixture(scope="module")
def divided() -> list[dict[str, Run]]:
    return run_ranks(every_case, 2)


@pytest.mark.parametrize("case", CASES)
def test_z1_z8_losses_under_zero3_equal_one_process(case, eager, divided):
    wanted, _ = eager[case]
    assert wanted[-1] < 0.95 * wanted[0], "a loss that does not fall would hide a dead step"
    for rank in divided:
        losses, _ = rank[case]
        assert losses[0] == pytest.approx(wanted[0], rel=1e-6)
        assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_z5_maskgit_samples_inside_training_alike_on_every_rank(case, eager, divided):
    first, second = (rank[case][1] for rank in divided)
    assert torch.equal(first, second)
    assert (first == eager[case][1]).float().mean() >= 0.95
