"""MaskGIT computes what muse-maskgit-pytorch 0.3.5 computes, from its weights and under the same chance.

Made by tests/assets/make_maskgit_reference.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokscale.base.batch import LOWRES_CODES, TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.errors import ConfigError
from tokscale.models.maskgit import MaskGit, MaskGitSampling
from tokscale.models.maskgit.masking import Draws
from tokscale.models.maskgit.original import config_from_original, state_dict_from_original
from tokscale.models.maskgit.sample import EditInputs
from tokscale.nn.conditioning import Context
from tokscale.nn.sampling import guide

FOLDER = Path(__file__).parents[1] / "assets" / "reference"
CASES = np.load(FOLDER / "maskgit_cases.npz")
WEIGHTS = np.load(FOLDER / "maskgit_weights.npz")
LISTING = json.loads(str(CASES["listing"]))
GRID = (LISTING["side"],) * 2
COUNT = GRID[0] * GRID[1]


def original_state(case: str) -> dict[str, torch.Tensor]:
    names = LISTING["names"][case]
    return {key.partition("@")[0]: torch.from_numpy(WEIGHTS[key].astype(np.float32)) for key in names}


def imported(case: str, **options: Any) -> MaskGit:
    about = LISTING["losses"].get(case) or LISTING["drawings"].get(case.removeprefix("drawn_"), {})
    kept = {
        name: value
        for name, value in about.items()
        if name in ("self_cond", "no_mask_token_prob", "critic_loss_weight")
    }
    state = original_state(case)
    config = config_from_original(state, image_grid=GRID, loss_mean="tokens", **kept | options)
    model = MaskGit(config)
    model.load_state_dict(state_dict_from_original(state, config), strict=True)
    return model.eval()


def stored(name: str) -> torch.Tensor:
    value = torch.from_numpy(CASES[name])
    return value.float() if value.is_floating_point() else value


def batch(low: bool = False) -> TokenBatch:
    states = stored("text")
    extra = {TEXT_EMBEDS: states, TEXT_EMBEDS_MASK: (states != 0).any(-1)}
    extra |= {LOWRES_CODES: stored("logits/low").unflatten(1, (2, 2))} if low else {}
    nothing = torch.zeros(len(states), 0, dtype=torch.int64)
    codes = stored("codes").unflatten(1, GRID)
    return TokenBatch(torch.arange(len(states)), nothing, nothing > 0, codes, extra=extra)


def context(model: MaskGit, data: TokenBatch, keep: bool) -> Context:
    told = model.reader(data.text, data.text_mask, data.extra)
    return model.transformer.text_hidden(model.transformer.context(told), torch.full((len(data),), keep))


LOWRES = {"lowres": {"image_grid": (2, 2), "shared_emb": True}}


@pytest.mark.parametrize("case", ["told", "dropped", "lowres", "lowres_dropped", "self_cond", "guided", "hidden"])
def test_logits_equal_the_original(case):
    low = case.startswith("lowres")
    model, data = imported("self_cond", **LOWRES if low else {}), batch(low)
    embed = stored("logits/embed") if case == "self_cond" else None
    net, ids = model.transformer, stored("logits/ids")
    hidden = net(ids, context(model, data, keep=not case.endswith("dropped")), embed)
    found = hidden if case == "hidden" else net.to_logits(hidden)
    if case == "guided":
        found = guide(found, net.to_logits(net(ids, context(model, data, keep=False))), 3.0)
    torch.testing.assert_close(found, stored(f"logits/{case}"), rtol=1e-4, atol=2e-5)


def given_draws(case: str) -> Draws:
    """The choices that the original made, by the order in which it makes them."""
    about, first = LISTING["losses"][case], f"loss/{case}/"
    randoms = [stored(name) for name in CASES.files if name.startswith(first + "random")]
    use_self_cond = randoms.pop(0) < 0.9 if about.get("self_cond") else torch.tensor(False)
    uniform = [stored(f"{first}uniform/{index}") for index in range(3 if about.get("critic") else 2)]
    return Draws(
        times=uniform[0],
        order=stored(first + "rand/0"),
        visible=stored(first + ("rand/1" if "no_mask_token_prob" in about else "rand/0")),
        keep_condition=uniform[1][:, 0] < 0.5,
        critic_keep_condition=uniform[-1][:, 0] < 0.5,
        use_self_cond=use_self_cond.expand(3),
        temperatures=(randoms[0] if randoms else torch.zeros(())).expand(3),
        gumbel=lambda mask, vocab: stored(first + "gumbel/0")[mask],
    )


@pytest.mark.parametrize("case", LISTING["losses"])
def test_losses_and_gradients_equal_the_original_under_the_same_draws(case):
    low = case == "lowres"
    model = imported(case, **LOWRES if low else {})
    total = model.loss(batch(low), given_draws(case)).total
    total.backward()
    torch.testing.assert_close(total.detach(), stored(f"loss/{case}/total"), rtol=1e-5, atol=0)
    layer = model.transformer.transformer_blocks.layers[0]
    for ours, name in (
        (model.transformer.token_emb.weight, "transformer.token_emb.weight"),
        (layer.cross_attn.null_kv, "transformer.transformer_blocks.layers.0.1.null_kv"),
    ):
        wanted = stored(f"loss/{case}/grad/{name}").reshape(ours.shape)
        torch.testing.assert_close(ours.grad, wanted, rtol=1e-3, atol=1e-5)


class Given:
    """The original's noise in the place of seeded noise."""

    def __init__(self, case: str):
        self._case = f"drawn/{case}/"

    def gumbel(self, step: int, places: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        noise = stored(f"{self._case}gumbel/{step}")
        return noise[torch.arange(len(places))[:, None, None], places[..., None], ids]

    def uniform(self, step: int, name: str, count: int) -> torch.Tensor:
        return stored(f"{self._case}uniform/{step}")


@pytest.mark.parametrize("case", LISTING["drawings"])
def test_generated_codes_are_the_originals_under_the_same_noise(case):
    options = {name: v for name, v in LISTING["drawings"][case].items() if name not in ("critic", "self_cond")}
    model, data = imported("drawn_" + case), batch()
    with torch.no_grad():
        told = model.reader(data.text, data.text_mask, data.extra)
        sampler = model.sampler(MaskGitSampling(**options), told, None, Given(case))
        codes = sampler.run(EditInputs(None, None))
    assert torch.equal(codes.unflatten(1, GRID), stored(f"drawn/{case}/codes"))


def test_entries_without_a_place_are_named():
    state = original_state("plain")
    config = config_from_original(state, image_grid=GRID)
    with pytest.raises(ConfigError, match=r"layers\.0\.3\.gate: nothing here"):
        state_dict_from_original(state | {"transformer.transformer_blocks.layers.0.3.gate": torch.zeros(1)}, config)
    with pytest.raises(ConfigError, match=r"norm\.beta: an offset"):
        state_dict_from_original(state | {"transformer.transformer_blocks.norm.beta": torch.ones(1)}, config)
    del state["transformer.to_logits.weight"]
    with pytest.raises(ConfigError, match=r"no transformer\.to_logits\.weight"):
        config_from_original(state, image_grid=GRID)


def test_image_tokenizers_and_what_the_original_never_uses_are_left_out():
    state = original_state("plain") | {"vae.codebook": torch.ones(2), "transformer.norm.gamma": torch.ones(32)}
    found = state_dict_from_original(state, config_from_original(state, image_grid=GRID))
    assert not [name for name in found if "vae" in name or "self_cond" in name or name == "transformer.norm.weight"]
