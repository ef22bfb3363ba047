"""The feed-forward of every layer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokscale.base.shapes import Float, Tensor
from tokscale.nn.gated import gated


class FeedForward(nn.Module):
    """One half of the hidden layer, times the GELU of the other, back to `dim` (GEGLU, arXiv:2002.05202).

    Without `gated`, the hidden layer has one half only.
    """

    def __init__(self, dim: int, mult: float, dropout: float, *, gated: bool = True) -> None:
        super().__init__()
        hidden = int(dim * mult)
        self.gated = gated
        self.to_hidden = nn.Linear(dim, 2 * hidden if gated else hidden)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Each position by itself."""
        return recomputed(self._leave, self.to_hidden(x), draws=self.training and self.dropout.p > 0)

    def _leave(self, hidden: Tensor) -> Tensor:
        return self.to_out(self.dropout(gated(hidden, active=1) if self.gated else F.gelu(hidden)))


def recomputed(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "*places before"], *, draws: bool = False
) -> Float[Tensor, "*after"]:
    """`function(x)`, for one that ends in a matrix product after cheap steps: norms, activations, dropout.

    Of all its tensors only `x` is kept for the backward pass, which computes the rest again up to the product.

    Args:
        function: From one tensor to another.
        x: The one.
        draws: Whether it draws random numbers, whose generators' states are then kept, too.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=draws)
