"""The feed-forward of every layer."""

import torch.nn.functional as F
from torch import nn

from tokscale.base.shapes import Float, Tensor


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
        hidden = self.to_hidden(x)
        if not self.gated:
            return self.to_out(self.dropout(F.gelu(hidden)))
        value, gate = hidden.chunk(2, dim=-1)
        return self.to_out(self.dropout(value * F.gelu(gate)))
