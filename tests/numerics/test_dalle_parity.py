"""DALL-E computes what dalle-pytorch 1.6.6 computes, from its weights. Made by tests/assets/make_dalle_reference.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokscale.base.batch import TokenBatch
from tokscale.base.errors import ConfigError
from tokscale.models.dalle import DALLE
from tokscale.models.dalle.original import config_from_original, state_dict_from_original

FOLDER = Path(__file__).parents[1] / "assets" / "reference"
CASES = np.load(FOLDER / "dalle_cases.npz")
WEIGHTS = np.load(FOLDER / "dalle_weights.npz")
LISTING = json.loads(str(CASES["listing"]))


def original_state(case: str) -> dict[str, torch.Tensor]:
    names = LISTING[case]["names"]
    return {name: torch.from_numpy(WEIGHTS[key].astype(np.float32)) for name, key in names.items()}


def imported(case: str) -> DALLE:
    about = LISTING[case]
    grid = (about["side"], about["side"])
    config = config_from_original(about["hparams"], num_image_tokens=about["num_image_tokens"], image_grid=grid)
    model = DALLE(config)
    model.load_state_dict(state_dict_from_original(original_state(case), config), strict=True)
    return model.eval()


def batch(case: str) -> TokenBatch:
    text = torch.from_numpy(CASES[f"{case}/text"])
    codes = torch.from_numpy(CASES[f"{case}/codes"]).unflatten(1, (LISTING[case]["side"],) * 2)
    return TokenBatch(positions=torch.arange(len(text)), text=text, text_mask=text != 0, codes=codes)


@pytest.mark.parametrize("case", LISTING)
def test_logits_equal_the_original(case):
    model, data = imported(case), batch(case)
    wanted = torch.from_numpy(CASES[f"{case}/logits"])
    torch.testing.assert_close(model.logits(data.text, data.codes), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LISTING)
def test_loss_and_gradients_equal_the_original(case):
    model, about = imported(case), LISTING[case]
    loss = model(batch(case)).total
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.from_numpy(CASES[f"{case}/loss"]), rtol=1e-6, atol=0)
    # The original's gradients under our names: the same renaming that weights go through.
    state = original_state(case)
    marked = {}
    for name, key in about["names"].items():
        stored = f"{case}/grad/{key}"
        gradient = torch.from_numpy(CASES[stored]) if stored in CASES.files else torch.full_like(state[name], torch.nan)
        marked[name] = gradient
    compared = 0
    for name, wanted in state_dict_from_original(marked, model.config).items():
        if not wanted.isnan().any():
            torch.testing.assert_close(model.get_parameter(name).grad, wanted, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared >= 3


def test_empty_captions_equal_the_original_null_condition():
    model, data = imported("full"), batch("full")
    wanted = torch.from_numpy(CASES["full/null_logits"])
    torch.testing.assert_close(model.logits(torch.zeros_like(data.text), data.codes), wanted, rtol=1e-5, atol=1e-5)


def test_entries_without_a_place_are_named():
    state, config = original_state("full"), imported("full").config
    with pytest.raises(ConfigError, match=r"layers\.0\.0\.fn\.gate"):
        state_dict_from_original(state | {"transformer.layers.layers.0.0.fn.gate": torch.zeros(1)}, config)
    del state["text_emb.weight"]
    with pytest.raises(ConfigError, match=r"no text_emb\.weight"):
        state_dict_from_original(state, config)


def test_options_that_cannot_be_carried_over_are_named():
    sizes = {"num_image_tokens": 24, "image_grid": (4, 4)}
    with pytest.raises(ConfigError, match="'sparse' drew its blocks at random"):
        config_from_original({"dim": 32, "depth": 1, "attn_types": ("sparse",)}, **sizes)
    with pytest.raises(ConfigError, match=r"hparams\.attn_types\[0\]: got 'mlp'"):
        config_from_original({"dim": 32, "depth": 1, "attn_types": ("mlp",)}, **sizes)


def test_options_left_out_of_a_checkpoint_take_the_original_defaults():
    config = config_from_original({"dim": 32, "depth": 1}, num_image_tokens=24, image_grid=(4, 4))
    assert (config.num_text_tokens, config.text_seq_len, config.shift_tokens, config.rotary_emb) == (
        10000,
        256,
        True,
        True,
    )
