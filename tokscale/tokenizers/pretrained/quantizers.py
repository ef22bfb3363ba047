"""From features to ids and back: deterministic, and in fp32 whatever the convolutions ran in."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tokscale.base.shapes import Float, Int, Tensor
from tokscale.tokenizers.quantize.base import nearest


class Quantizer(nn.Module, ABC):
    """A finite set of vectors to stand for features."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "batch dim grid_h grid_w"]) -> Int[Tensor, "batch *code_shape"]:
        """Ids of features."""

    @abstractmethod
    def lookup(self, codes: Int[Tensor, "batch *code_shape"]) -> Float[Tensor, "batch dim grid_h grid_w"]:
        """Vectors of ids."""


class NearestQuantizer(Quantizer):
    """The nearest code vector; with `cosine`, vectors and features are first brought to unit length (LlamaGen)."""

    def __init__(self, num_tokens: int, dim: int, *, cosine: bool = False):
        super().__init__()
        self.codebook = nn.Embedding(num_tokens, dim)
        self.cosine = cosine

    def forward(self, features: Float[Tensor, "batch dim grid_h grid_w"]) -> Int[Tensor, "batch grid_h grid_w"]:
        """Ids of the nearest vectors."""
        rows = rearrange(features, "b d h w -> (b h w) d")
        if self.cosine:
            rows = F.normalize(rows, dim=-1)
        ids = nearest(rows, self._vectors())
        return rearrange(ids, "(b h w) -> b h w", h=features.shape[-2], w=features.shape[-1])

    def lookup(self, codes: Int[Tensor, "batch grid_h grid_w"]) -> Float[Tensor, "batch dim grid_h grid_w"]:
        """Vectors of ids."""
        return rearrange(F.embedding(codes, self._vectors()), "b h w d -> b d h w")

    def _vectors(self) -> Float[Tensor, "vocab dim"]:
        return F.normalize(self.codebook.weight, dim=-1) if self.cosine else self.codebook.weight


class GumbelQuantizer(Quantizer):
    """Logits over the codes (taming's Gumbel VQGAN).

    The original draws Gumbel noise here even for inference. Ids are the most likely codes instead, so that the same
    image always has the same ids.
    """

    def __init__(self, num_tokens: int, dim: int, features: int):
        super().__init__()
        self.proj = nn.Conv2d(features, num_tokens, 1)
        self.codebook = nn.Embedding(num_tokens, dim)

    def forward(self, features: Float[Tensor, "batch dim grid_h grid_w"]) -> Int[Tensor, "batch grid_h grid_w"]:
        """The most likely ids."""
        return self.proj(features).argmax(dim=1)

    def lookup(self, codes: Int[Tensor, "batch grid_h grid_w"]) -> Float[Tensor, "batch dim grid_h grid_w"]:
        """Vectors of ids."""
        return rearrange(self.codebook(codes), "b h w d -> b d h w")


class ResidualQuantizer(Quantizer):
    """Each level quantizes what the levels before left over; the levels are the last axis of the codes (RQ-VAE)."""

    def __init__(self, num_tokens: int, dim: int, levels: int, *, shared_codebook: bool):
        super().__init__()
        self.codebooks = nn.ModuleList(nn.Embedding(num_tokens, dim) for _ in range(1 if shared_codebook else levels))
        self.levels = levels

    def forward(self, features: Float[Tensor, "batch dim grid_h grid_w"]) -> Int[Tensor, "batch grid_h grid_w levels"]:
        """Ids of all levels."""
        rest = rearrange(features, "b d h w -> (b h w) d")
        ids = []
        for level in range(self.levels):
            codebook = self._codebook(level)
            ids.append(nearest(rest, codebook.weight))
            rest = rest - codebook(ids[-1])
        return rearrange(torch.stack(ids, dim=-1), "(b h w) l -> b h w l", h=features.shape[-2], w=features.shape[-1])

    def lookup(self, codes: Int[Tensor, "batch grid_h grid_w levels"]) -> Float[Tensor, "batch dim grid_h grid_w"]:
        """Sum of the levels' vectors."""
        vectors = torch.stack([self._codebook(level)(codes[..., level]) for level in range(self.levels)]).sum(dim=0)
        return rearrange(vectors, "b h w d -> b d h w")

    def entries(self) -> Float[Tensor, "books vocab dim"]:
        """The codebooks: one for each level, or one for all."""
        return torch.stack([self._codebook(level).weight for level in range(len(self.codebooks))])

    def _codebook(self, level: int) -> nn.Embedding:
        codebook = self.codebooks[level % len(self.codebooks)]
        assert isinstance(codebook, nn.Embedding)
        return codebook
