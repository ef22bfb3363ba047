"""RQ-Transformer under ZeRO-3 with every parameter divided, on two real ranks, against one plain process."""

import pytest
import torch
from zero_runs import SIZE, Run, assert_codes_alike, assert_losses_equal, build, train

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.models.registry import build_model
from tokscale.models.rqtransformer import (
    HierarchicalCausalTransformer,
    HierarchicalConfig,
    RQSampling,
    RQTransformerConfig,
)

SMALL = {"dim": 16, "heads": 2, "dim_head": 8, "num_tokens": 13, "num_text_tokens": 11, "text_seq_len": 5}
PLACES = {"image_grid": (2, 3), "max_spatial_seq_len": 6, "depth_seq_len": 2, "spatial_layers": 2, "depth_layers": 1}
CASES = {
    "caption": {
        "condition": {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8},
        "cond_drop_prob": 0.3,
        "cumulative_depth": True,
        "remat": "block",
    },
    "reversible_shared": {
        "reversible": True,
        "spatial_layers": 4,
        "depth_layers": 2,
        "shared_attn_ids": (0, 1),
        "shared_ff_ids": (0,),
        "rotary_emb": True,
        "shared_code_emb": False,
    },
    "hierarchical": {},
}


def make(case: str) -> HierarchicalCausalTransformer:
    if case == "hierarchical":
        config = HierarchicalConfig(**SMALL, depth=(1, 1, 1), max_seq_len=(2, 3, 2))  # type: ignore[arg-type]
    else:
        config = RQTransformerConfig(**SMALL | PLACES | CASES[case])  # type: ignore[arg-type]
    with rng.scope(0, "model"):
        model = build_model(config)
    assert isinstance(model, HierarchicalCausalTransformer)
    return model


def batch(step: int) -> TokenBatch:
    text = torch.randint(0, 4, (SIZE, 5), generator=rng.generator(0, "text"))
    codes = (text.sum(1)[:, None, None, None] + torch.arange(12).view(2, 3, 2)) % 13
    return TokenBatch(torch.arange(step * SIZE, (step + 1) * SIZE), text, text != 0, codes)


def trained(comm: Comm, case: str) -> Run:
    """Losses of a few steps over two micro batches, and codes that the trained model samples on every rank."""
    engine = build(comm, lambda: make(case))
    losses, some = train(engine, comm, batch), batch(0)
    with engine.gathered() as model:
        options = RQSampling(cond_scale=2.0, filter_thres=0.5)
        return losses, model.generate_codes(some.text, some.text_mask, options=options, seeds=list(range(SIZE)))


def every_case(comm: Comm) -> dict[str, Run]:
    return {case: trained(comm, case) for case in CASES}


@pytest.fixture(scope="module")
def eager() -> dict[str, Run]:
    return run_ranks(every_case, 1)[0]


@pytest.fixture(scope="module")
def divided() -> list[dict[str, Run]]:
    return run_ranks(every_case, 2)


@pytest.mark.parametrize("case", CASES)
def test_losses_under_zero3_equal_one_process(case, eager, divided):
    assert_losses_equal(case, eager, divided)


@pytest.mark.parametrize("case", CASES)
def test_sampling_inside_training_is_the_same_on_every_rank(case, eager, divided):
    assert_codes_alike(case, eager, divided)
