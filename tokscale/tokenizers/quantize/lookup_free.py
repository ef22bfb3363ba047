"""Quantizers without a codebook: the signs of features, or features rounded to a few values."""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange

from tokscale.base.shapes import Float, Int, Tensor
from tokscale.nn.constants import constant
from tokscale.tokenizers.quantize.base import Quantized, TrainedQuantizer, exact, straight_through
from tokscale.tokenizers.quantize.config import FSQConfig, LFQConfig
from tokscale.tokenizers.quantize.entropy import entropy, mean_over_ranks

Maps = Float[Tensor, "batch dim grid_h grid_w"]
Rows = Float[Tensor, "rows dim"]


class LookupFreeQuantizer(TrainedQuantizer):
    """The sign of each feature is a bit, the first feature the highest."""

    def __init__(self, config: LFQConfig):
        super().__init__()
        self.config, self.num_tokens, self.dim = config, config.num_tokens, config.dim

    def forward(self, features: Maps) -> Quantized:
        """See `TrainedQuantizer`."""
        config = self.config
        with exact(features.device):
            features = features.float()
            signs = torch.where(features > 0, 1.0, -1.0)
            parts = {"commitment": F.mse_loss(features, signs)}
            weights = {"commitment": config.commitment_weight}
            if config.entropy_weight:
                parts["entropy"] = self._entropy(rearrange(features, "b d h w -> (b h w) d"))
                weights["entropy"] = config.entropy_weight
            return Quantized(straight_through(features, signs), self.ids(features), parts, weights)

    @torch.no_grad()
    def ids(self, features: Maps) -> Int[Tensor, "batch grid_h grid_w"]:
        """Codes of features."""
        return einsum((features > 0).long(), self._places(features.device), "b d h w, d -> b h w")

    def lookup(self, codes: Int[Tensor, "batch grid_h grid_w"]) -> Maps:
        """Their signs."""
        bits = rearrange(codes, "b h w -> b 1 h w") & rearrange(self._places(codes.device), "d -> d 1 1")
        return torch.where(bits > 0, 1.0, -1.0)

    def _places(self, device: torch.device) -> Int[Tensor, "dim"]:
        return 1 << torch.arange(self.dim - 1, -1, -1, device=device)

    def _entropy(self, rows: Rows) -> Float[Tensor, ""]:
        """The loss of `entropy.entropy_loss` over all codes, whose probabilities are products over bits.

        A softmax over `2 t <row, code>` gives bit i the odds `exp(4 t row_i)`, independently of the others. So each
        row's entropy is a sum over bits; the mean's is not, and is taken over groups of bits.
        """
        positive = torch.sigmoid(4 * self.config.entropy_inv_temperature * rows)
        each = entropy(torch.stack([positive, 1 - positive], dim=-1)).sum(dim=1).mean()
        size = math.ceil(self.dim / math.ceil(self.dim / self.config.entropy_bits))
        groups = [entropy(mean_over_ranks(_joint(part).mean(dim=0))) for part in positive.split(size, dim=1)]
        return each - self.config.diversity_gamma * torch.stack(groups).sum()


class FiniteScalarQuantizer(TrainedQuantizer):
    """Each feature bounded by a tanh and rounded to a few values; the first feature counts fastest."""

    def __init__(self, config: FSQConfig):
        super().__init__()
        self.config, self.num_tokens, self.dim = config, config.num_tokens, config.dim

    def forward(self, features: Maps) -> Quantized:
        """See `TrainedQuantizer`. There is no loss: rounding moves nothing far."""
        with exact(features.device):
            bounded = self._bounded(features.float())
            whole = bounded.round()
            vectors = straight_through(bounded, whole) / self._halves(features)
            return Quantized(vectors, self._index(whole))

    @torch.no_grad()
    def ids(self, features: Maps) -> Int[Tensor, "batch grid_h grid_w"]:
        """Codes of features."""
        return self._index(self._bounded(features.float()).round())

    def lookup(self, codes: Int[Tensor, "batch grid_h grid_w"]) -> Maps:
        """Their values, between -1 and 1."""
        counts, strides = self._counts(codes.device), self._strides(codes.device)
        steps = rearrange(codes, "b h w -> b 1 h w") // strides % counts
        return (steps - counts // 2) / (counts // 2).float()

    def _bounded(self, features: Maps) -> Maps:
        """Between the outermost values; an even number of them is shifted by half a step so that zero is one."""
        counts = self._counts(features.device).float()
        half = (counts - 1) * (1 + 1e-3) / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0)
        return torch.tanh(features + torch.atanh(offset / half)) * half - offset

    def _index(self, whole: Maps) -> Int[Tensor, "batch grid_h grid_w"]:
        steps = whole.detach().long() + self._counts(whole.device) // 2
        return (steps * self._strides(whole.device)).sum(dim=1)

    def _halves(self, like: Maps) -> Float[Tensor, "dim 1 1"]:
        return (self._counts(like.device) // 2).float()

    def _counts(self, device: torch.device) -> Int[Tensor, "dim 1 1"]:
        return rearrange(constant(self.config.levels, torch.int64, device), "d -> d 1 1")

    def _strides(self, device: torch.device) -> Int[Tensor, "dim 1 1"]:
        strides = [math.prod(self.config.levels[:at]) for at in range(self.dim)]
        return rearrange(constant(tuple(strides), torch.int64, device), "d -> d 1 1")


def _joint(positive: Rows) -> Float[Tensor, "rows codes"]:
    """Probabilities of all combinations of independent bits."""
    joint = positive.new_ones(len(positive), 1)
    for bit in positive.unbind(dim=1):
        both = torch.stack([1 - bit, bit], dim=1)
        joint = rearrange(einsum(joint, both, "n c, n two -> n c two"), "n c two -> n (c two)")
    return joint
