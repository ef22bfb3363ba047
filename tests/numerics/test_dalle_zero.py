"""DALL-E and CLIP under ZeRO-3 with every parameter divided, on two real ranks, against one plain process."""

import pytest
import torch
from zero_runs import SIZE, Run, assert_codes_alike, assert_losses_equal, build, train

from tokscale.base import rng
from tokscale.base.batch import ImageBatch, TokenBatch
from tokscale.base.protocols import using
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.models.clip import CLIP, CLIPConfig
from tokscale.models.dalle import DALLE, DALLEConfig, DALLESampling

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


def make_clip() -> CLIP:
    sizes = {"num_text_tokens": 11, "text_seq_len": 5, "visual_image_size": 8, "visual_patch_size": 4}
    small = {"dim_text": 16, "dim_image": 12, "dim_latent": 8, "text_enc_depth": 1, "visual_enc_depth": 1}
    with rng.scope(0, "model"):
        return CLIP(CLIPConfig(**sizes | small, text_heads=2, visual_heads=2, dim_head=8))


def batch(step: int) -> TokenBatch:
    text = torch.randint(0, 4, (SIZE, 5), generator=rng.generator(0, "text"))
    codes = (text.sum(1)[:, None, None] + torch.arange(12).view(3, 4)) % 13
    return TokenBatch(torch.arange(step * SIZE, (step + 1) * SIZE), text, text != 0, codes)


def pairs(step: int) -> ImageBatch:
    tokens = batch(step)
    pixels = torch.randint(0, 256, (SIZE, 3, 8, 8), generator=rng.generator(0, "pixels")).to(torch.uint8)
    return ImageBatch(tokens.positions, pixels, text=tokens.text, text_mask=tokens.text_mask)


def trained(comm: Comm, case: str) -> Run:
    """Losses of a few steps over two micro batches, and codes that the trained model samples on every rank."""
    engine = build(comm, lambda: make(case))
    losses, some = train(engine, comm, batch), batch(0)
    with engine.gathered() as model:
        codes = model.generate_codes(
            some.text, some.text_mask, options=DALLESampling(cond_scale=2.0), seeds=list(range(SIZE))
        )
    return losses, codes


def trained_clip(comm: Comm) -> Run:
    """Losses of a few steps, and scores by the trained model on every rank."""
    engine = build(comm, make_clip, micro_batches=1)
    with using(comm):
        losses, some = train(engine, comm, pairs, micro_batches=1), pairs(0)
    with engine.gathered() as model:
        return losses, model.score(some.text, some.text_mask, some.pixels)


def every_case(comm: Comm) -> dict[str, Run]:
    return {case: trained(comm, case) for case in CASES} | {"clip": trained_clip(comm)}


@pytest.fixture(scope="module")
def eager() -> dict[str, Run]:
    return run_ranks(every_case, 1)[0]


@pytest.fixture(scope="module")
def divided() -> list[dict[str, Run]]:
    return run_ranks(every_case, 2)


@pytest.mark.parametrize("case", [*CASES, "clip"])
def test_losses_under_zero3_equal_one_process(case, eager, divided):
    assert_losses_equal(case, eager, divided)


@pytest.mark.parametrize("case", CASES)
def test_sampling_inside_training_is_the_same_on_every_rank(case, eager, divided):
    assert_codes_alike(case, eager, divided)


def test_scores_inside_training_are_the_same_on_every_rank(eager, divided):
    first, second = (rank["clip"][1] for rank in divided)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, eager["clip"][1], rtol=1e-3, atol=1e-3)
