"""Parti computes what parti-pytorch 0.2.0 computes, from its weights. Made by tests/assets/make_parti_reference.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.errors import ConfigError
from tokscale.models.parti import Parti
from tokscale.models.parti.original import config_from_original, state_dict_from_original
from tokscale.nn.conditioning import Context

CASES = np.load(Path(__file__).parents[1] / "assets" / "reference" / "parti_cases.npz")
LISTING = json.loads(str(CASES["listing"]))


def stored(case: str, name: str) -> torch.Tensor:
    return torch.from_numpy(CASES[f"{case}/{name}"])


def original_state(case: str) -> dict[str, torch.Tensor]:
    start = f"{case}/state/"
    return {
        name.removeprefix(start): torch.from_numpy(CASES[name].astype(np.float32))
        for name in CASES.files
        if name.startswith(start)
    }


def imported(case: str) -> Parti:
    about = LISTING[case]
    grid = (about["side"], about["side"])
    config = config_from_original(about["hparams"], image_grid=grid, num_image_tokens=about["num_image_tokens"])
    model = Parti(config)
    model.load_state_dict(state_dict_from_original(original_state(case), config), strict=True)
    return model.eval()


def told(model: Parti, case: str) -> Context:
    extra = {TEXT_EMBEDS: stored(case, "states"), TEXT_EMBEDS_MASK: stored(case, "mask")}
    text = torch.zeros(len(extra[TEXT_EMBEDS]), 1, dtype=torch.long)
    return model.encode_condition(text, text > 0, extra)


@pytest.mark.parametrize("count", [0, 1, 9, 15])
@pytest.mark.parametrize("case", LISTING)
def test_logits_equal_the_original(case, count):
    model = imported(case)
    logits = model.logits(stored(case, "codes")[:, :count], told(model, case))
    torch.testing.assert_close(logits, stored(case, f"logits_{count}"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LISTING)
def test_guided_and_null_logits_equal_the_original(case):
    model = imported(case)
    codes, context = stored(case, "codes")[:, :9], told(model, case)
    guided = model.logits_with_cond_scale(codes, context, 2.5)
    torch.testing.assert_close(guided, stored(case, "guided"), rtol=1e-5, atol=1e-5)
    null = model.logits(codes, context.only(torch.zeros(3, dtype=torch.bool)))
    torch.testing.assert_close(null, stored(case, "null_logits"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LISTING)
def test_loss_and_gradients_equal_the_original(case, monkeypatch):
    model, about = imported(case).train(), LISTING[case]
    monkeypatch.setattr(model, "kept_captions", lambda positions: torch.tensor(about["kept"]))
    extra = {TEXT_EMBEDS: stored(case, "states"), TEXT_EMBEDS_MASK: stored(case, "mask")}
    text = torch.zeros(3, 1, dtype=torch.long)
    codes = stored(case, "codes").unflatten(1, (about["side"],) * 2)
    loss = model(TokenBatch(torch.arange(3), text, text > 0, codes, extra=extra)).total
    loss.backward()
    torch.testing.assert_close(loss.detach(), stored(case, "loss"), rtol=1e-6, atol=0)
    # The original's gradients under our names: the same renaming that weights go through.
    state, compared = original_state(case), 0
    marked = {
        name: stored(case, f"grad/{name}")
        if f"{case}/grad/{name}" in CASES.files
        else torch.full_like(value, torch.nan)
        for name, value in state.items()
    }
    for name, wanted in state_dict_from_original(marked, model.config).items():
        if not wanted.isnan().any():
            torch.testing.assert_close(model.get_parameter(name).grad, wanted, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == 6


def test_what_is_missing_or_unknown_is_named():
    state, config = original_state("plain"), imported("plain").config
    del state["start_token"]
    with pytest.raises(ConfigError, match="no start_token"):
        state_dict_from_original(state, config)
    with pytest.raises(ConfigError, match="text_embed_dim"):
        config_from_original({"dim": 32, "depth": 1}, image_grid=(4, 4))
    with pytest.raises(ConfigError, match=r"hparams\.gated: unknown key"):
        config_from_original({"dim": 32, "depth": 1, "text_embed_dim": 8, "gated": 1}, image_grid=(4, 4))
