"""What a feed-forward keeps for its backward pass, and that computing the rest again changes no gradient."""

import pytest
import torch
from torch import nn

from tokscale.models.maskgit import layers as maskgit
from tokscale.models.parti import PartiConfig
from tokscale.models.parti import decoder as parti
from tokscale.nn import feedforward

DIM, POSITIONS = 8, 5


def _parti() -> nn.Module:
    return parti.FeedForward(PartiConfig(dim=DIM, depth=1, heads=1, dropout=0.3, ff_norm=True))


CASES = {
    "gated": (lambda: feedforward.FeedForward(DIM, 4, 0.3), feedforward),
    "plain": (lambda: feedforward.FeedForward(DIM, 4, 0.3, gated=False), feedforward),
    "parti": (_parti, parti),
    "maskgit": (lambda: maskgit.FeedForward(DIM), maskgit),
}


def _backward(module: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of the input and of every parameter, and the wide activations that autograd kept."""
    x = torch.randn(2, POSITIONS, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    return list(grads), [tensor for tensor in kept if tensor.shape[:2] == (2, POSITIONS) and tensor.shape[-1] > DIM]


@pytest.mark.parametrize("case", CASES)
def test_activations_are_computed_again_with_the_same_dropout_and_gradients(case, monkeypatch):
    make, place = CASES[case]
    torch.manual_seed(0)
    module = make().train()
    grads, kept = _backward(module)
    monkeypatch.setattr(place, "recomputed", lambda leave, hidden, **draws: leave(hidden))
    plain, all_kept = _backward(module)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(grads, plain, strict=True))
    assert len(kept) == 1 < len(all_kept)
