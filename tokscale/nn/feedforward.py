"""The gated feed-forward of every layer."""

import torch.nn.functional as F
from torch import nn

from tokscale.base.shapes import Float, Tensor


class FeedForward(nn.Module):
    """GEGLU (arXiv:2002.05202): one half of the hidden layer, times the GELU of the other, back to `dim`."""

    def __init__(self, dim: int, mult: float, dropout: float) -> None:
        super().__init__()
        hidden = int(dim * mult)
        self.to_hidden = nn.Linear(dim, 2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Each position by itself."""
        value, gate = self.to_hidden(x).chunk(2, dim=-1)
        return self.to_out(self.dropout(value * F.gelu(gate)))
