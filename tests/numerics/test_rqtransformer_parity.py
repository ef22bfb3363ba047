"""RQ-Transformer computes what RQ-transformer 0.1.8 computes. Made by tests/assets/make_rq_reference.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokscale.base.batch import TokenBatch
from tokscale.base.errors import ConfigError
from tokscale.models.rqtransformer import RQTransformer
from tokscale.models.rqtransformer.original import config_from_original, state_dict_from_original

CASES = np.load(Path(__file__).parents[1] / "assets" / "reference" / "rq_cases.npz")
LISTING = json.loads(str(CASES["listing"]))


def stored(case: str, kind: str) -> dict[str, torch.Tensor]:
    prefix = f"{case}/{kind}/"
    return {
        name.removeprefix(prefix): torch.from_numpy(CASES[name]).float() for name in CASES if name.startswith(prefix)
    }


def imported(case: str) -> RQTransformer:
    config = config_from_original(LISTING[case] | {"pad_id": 0})
    model = RQTransformer(config)
    model.load_state_dict(state_dict_from_original(stored(case, "weights"), config), strict=True)
    return model.eval()


@pytest.mark.parametrize("case", LISTING)
def test_loss_and_gradients_equal_the_original_that_is_right(case):
    model, codes = imported(case), torch.from_numpy(CASES[f"{case}/codes"])
    text = torch.zeros(2, 1, dtype=torch.long)
    loss = model(TokenBatch(torch.arange(2), text, text > 0, codes)).total
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.from_numpy(CASES[f"{case}/loss"]), rtol=1e-6, atol=0)
    places = {
        "token_emb.weight": "code_emb.weight",
        "spatial_start_token": "opening.start",
        "depth_pos_emb.weight": "stages.1.positions.weight",
        "to_logits.bias": "head.bias",
    }
    for name, wanted in stored(case, "grad").items():
        gradient = model.get_parameter(places[name]).grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", LISTING)
def test_logits_equal_the_original(case):
    model, part = imported(case), torch.from_numpy(CASES[f"{case}/part"])
    logits = model.logits(part).detach()
    first, rest = torch.from_numpy(CASES[f"{case}/first"]), torch.from_numpy(CASES[f"{case}/logits"])
    torch.testing.assert_close(logits[:, 0], first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, 1:], rest, rtol=1e-5, atol=1e-5)


def test_what_has_no_place_or_is_missing_is_named():
    state, config = stored("grid", "weights"), imported("grid").config
    with pytest.raises(ConfigError, match=r"spatial_transformer\.layers\.0\.0\.gate"):
        state_dict_from_original(state | {"spatial_transformer.layers.0.0.gate": torch.zeros(1)}, config)
    with pytest.raises(ConfigError, match=r"no token_emb\.weight"):
        state_dict_from_original({name: value for name, value in state.items() if "token" not in name}, config)
    with pytest.raises(ConfigError, match="plain blocks"):
        state_dict_from_original(state, config.model_copy(update={"ff_glu": True}))
    with pytest.raises(ConfigError, match=r"options\.heds: unknown key; did you mean 'heads'"):
        config_from_original(LISTING["grid"] | {"heds": 2})
