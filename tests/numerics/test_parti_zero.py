"""Parti under ZeRO-3 with every parameter divided, on two real ranks, against one plain process."""

import pytest
import torch
from zero_runs import (
    SIZE,
    Run,
    assert_codes_alike,
    assert_entropies_are_the_whole_models,
    assert_losses_equal,
    build,
    train,
)

from tokscale.base import rng
from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine.config import AdafactorConfig
from tokscale.models.parti import Parti, PartiConfig, PartiSampling

CAPTION = {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}
PAPER = {"condition": CAPTION, "rel_pos_bias": False, "multi_query": False, "attn_types": ("conv_like", "full")}
CASES = {
    "original": {"condition": {"kind": "embeddings", "width": 12}},
    "original_tied_remat": {"condition": CAPTION, "kv_tied": True, "rel_pos_index": "sequence", "remat": "block"},
    "paper": PAPER | {"kernel_size": 3, "ff_norm": False, "sandwich_norm": True},
    "paper_adafactor": PAPER | {"remat": "block"},
}


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


def trained(comm: Comm, case: str, dtype: str = "fp32") -> Run:
    """Losses of a few steps over two micro batches, and codes that the trained model samples on every rank."""
    optimizer = AdafactorConfig(lr=1e-2, min_factor=8) if case.endswith("adafactor") else None
    engine = build(comm, lambda: make(case), dtype=dtype, optimizer=optimizer)
    losses = train(engine, comm, batch, steps=3)
    if dtype == "fp32":
        assert_entropies_are_the_whole_models(engine, comm, batch(0))
    losses += train(engine, comm, lambda step: batch(step + 3), steps=3)
    some = batch(0)
    with engine.gathered() as model:
        how = PartiSampling(cond_scale=2.0, filter_thres=0.5)
        codes = model.generate_codes(some.text, some.text_mask, options=how, seeds=list(range(SIZE)), extra=some.extra)
    return losses, codes


def every_case(comm: Comm) -> dict[str, Run]:
    low = {} if comm.world == 1 else {f"{case}_bf16": trained(comm, case, "bf16") for case in ("original", "paper")}
    return {case: trained(comm, case) for case in CASES} | low


@pytest.fixture(scope="module")
def eager() -> dict[str, Run]:
    return run_ranks(every_case, 1)[0]


@pytest.fixture(scope="module")
def divided() -> list[dict[str, Run]]:
    return run_ranks(every_case, 2)


@pytest.mark.parametrize("case", CASES)
def test_losses_under_zero3_equal_one_process(case, eager, divided):
    assert_losses_equal(case, eager, divided, falls_to=0.95)


@pytest.mark.parametrize("case", CASES)
def test_sampling_inside_training_is_the_same_on_every_rank(case, eager, divided):
    assert_codes_alike(case, eager, divided)


@pytest.mark.parametrize("case", ["original", "paper"])
def test_bfloat16_trains_under_zero3(case, eager, divided):
    wanted, _ = eager[case]
    for rank in divided:
        losses, _ = rank[f"{case}_bf16"]
        assert losses[-1] < 0.95 * losses[0]
        assert losses[0] == pytest.approx(wanted[0], rel=2e-2)
