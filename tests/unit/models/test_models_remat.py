"""What is computed again draws the same random numbers again; where nothing is drawn, no generator's state is kept."""

from types import SimpleNamespace

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import decode
from tokscale.models.maskgit import layers
from tokscale.models.parti import decoder
from tokscale.models.registry import ModelConfig, build_model
from tokscale.nn import feedforward, stack

SMALL = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
CAPTION = {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 16}
IMAGE, TEXT = (
    SimpleNamespace(num_tokens=20, code_shape=(4, 4), image_size=16, channels=3),
    SimpleNamespace(num_tokens=30),
)
MODELS = {
    "dalle": (SMALL | {"text_seq_len": 6}, ("attn_dropout", "ff_dropout"), ("none", "block", "regions")),
    "parti": (SMALL | {"max_text_len": 6, "condition": CAPTION}, ("dropout",), ("none", "block")),
    "maskgit": (SMALL | {"condition": CAPTION, "text_seq_len": 6}, ("dropout",), ("none", "block")),
}
CASES = [(kind, key, remat) for kind, (_, keys, remats) in MODELS.items() for key in keys for remat in remats]
ELSEWHERE = (feedforward, stack, decoder, layers)
"""Modules that call `checkpoint`."""


def gradients(kind: str, options: dict) -> dict[str, torch.Tensor]:
    config = decode(ModelConfig, MODELS[kind][0] | {"kind": kind} | options).fitted(IMAGE, TEXT)
    with rng.scope(0, "init"):
        model = build_model(config).train()
    draw = rng.generator(0, "batch")
    text, codes = torch.randint(1, 30, (2, 6), generator=draw), torch.randint(0, 20, (2, 4, 4), generator=draw)
    with rng.scope(0, "step"):
        model(TokenBatch(torch.arange(2), text, text > 0, codes)).total.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("kind", "dropout", "remat"), CASES)
def test_what_is_computed_again_drops_the_same_again(kind, dropout, remat, monkeypatch):
    options = {dropout: 0.4, "remat": remat}
    again = gradients(kind, options)
    for module in ELSEWHERE:
        monkeypatch.setattr(module, "checkpoint", lambda function, *given, **how: function(*given))
    once = gradients(kind, options)
    assert again.keys() == once.keys()
    for name, gradient in once.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.allclose(gradients(kind, {})[name], gradient) for name, gradient in once.items())


@pytest.mark.parametrize("kind", MODELS)
def test_no_state_of_a_generator_is_kept_where_nothing_is_drawn(kind, monkeypatch):
    kept: list[str] = []
    real = torch.get_rng_state

    def get_rng_state() -> torch.Tensor:
        kept.append("state")
        return real()

    monkeypatch.setattr(torch, "get_rng_state", get_rng_state)
    dropout = MODELS[kind][1][-1]
    with monkeypatch.context() as patch:
        patch.setattr(rng, "scope", lambda *names, **device: torch.enable_grad())  # it keeps states of its own
        gradients(kind, {"remat": "block"})
        assert not kept
        gradients(kind, {"remat": "block", dropout: 0.4})
    assert kept
