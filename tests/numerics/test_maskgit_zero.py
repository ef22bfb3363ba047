"""MaskGIT under ZeRO-3 with every parameter divided, on two real ranks, against one plain process."""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
from tokscale.base.batch import LOWRES_CODES, TokenBatch
from tokscale.base.protocols import Engine
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.models.maskgit import MaskGit, MaskGitConfig, MaskGitSampling

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


@dataclass(frozen=True)
class Drawn:
    """What a rank draws, of as many images as it likes."""

    codes: torch.Tensor
    held: int
    """Most elements of parameters that were whole at once."""


def drawn(engine: Engine, comm: Comm, *, by_module: bool) -> Drawn:
    """Codes of all captions on the first rank, of fewer on the next."""
    some, count, held = batch(0), SIZE - 3 * comm.rank, 0

    def look(module: Any, *_: Any) -> None:
        nonlocal held
        held = max(held, sum(parameter.numel() for parameter in engine.model.parameters()))

    with engine.gathered(by_module=by_module) as model:
        watched = [module.register_forward_pre_hook(look) for module in model.modules()]
        how = MaskGitSampling(timesteps=4)
        codes = model.generate_codes(
            some.text[:count],
            some.text_mask[:count],
            options=how,
            seeds=list(range(count)),
            extra={LOWRES_CODES: some.extra[LOWRES_CODES][:count]},
        )
        for watch in watched:
            watch.remove()
    return Drawn(codes, held)


class Trained(NamedTuple):
    """Of one case."""

    run: Run
    """Losses of a few steps over two micro batches, and codes that the trained model samples on every rank."""
    whole: Drawn
    by_module: Drawn


def trained(comm: Comm, case: str) -> Trained:
    engine = build(comm, lambda: make(case))
    losses = train(engine, comm, batch, steps=3)
    assert_entropies_are_the_whole_models(engine, comm, batch(0))
    early = drawn(engine, comm, by_module=True)
    assert torch.equal(early.codes, drawn(engine, comm, by_module=False).codes)
    losses += train(engine, comm, lambda step: batch(step + 3), steps=3)
    some = batch(0)
    with engine.gathered() as model:
        how = MaskGitSampling(timesteps=4)
        codes = model.generate_codes(some.text, some.text_mask, options=how, seeds=list(range(SIZE)), extra=some.extra)
    both = (drawn(engine, comm, by_module=by_module) for by_module in (False, True))
    return Trained((losses, codes), *both)


def every_case(comm: Comm) -> dict[str, Trained]:
    return {case: trained(comm, case) for case in CASES}


@pytest.fixture(scope="module")
def eager() -> dict[str, Run]:
    return {case: found.run for case, found in run_ranks(every_case, 1)[0].items()}


@pytest.fixture(scope="module")
def every_rank() -> list[dict[str, Trained]]:
    return run_ranks(every_case, 2)


@pytest.fixture(scope="module")
def divided(every_rank) -> list[dict[str, Run]]:
    return [{case: found.run for case, found in rank.items()} for rank in every_rank]


@pytest.mark.parametrize("case", CASES)
def test_losses_under_zero3_equal_one_process(case, eager, divided):
    assert_losses_equal(case, eager, divided, falls_to=0.95)


@pytest.mark.parametrize("case", CASES)
def test_maskgit_samples_inside_training_alike_on_every_rank(case, eager, divided):
    assert_codes_alike(case, eager, divided, agree=0.95)


@pytest.mark.parametrize("case", CASES)
def test_weights_that_stay_divided_draw_the_same_whatever_other_ranks_draw(case, every_rank):
    parameters = sum(parameter.numel() for parameter in make(case).parameters())
    for rank in every_rank:
        whole, by_module = rank[case].whole, rank[case].by_module
        assert torch.equal(whole.codes, by_module.codes) and whole.codes.unique().numel() > 1
        assert whole.held == parameters and by_module.held < parameters / 4
    assert len(every_rank[0][case].whole.codes) > len(every_rank[1][case].whole.codes)
