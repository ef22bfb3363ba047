"""Soft targets and drawn codes for residual codes (RQ-Transformer, arXiv:2203.01941, section 3.2.3).

Nearby entries of a codebook stand for nearly the same patch, so a transformer need not be told that one of them is
right and all others are wrong. A level's distribution is the softmax of the negative squared distances between its
entries and what the levels before left over, divided by a temperature: the target of the loss, and what codes can be
drawn from.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field

from tokscale.base.config import Config
from tokscale.base.errors import ConfigError
from tokscale.base.rng import uniforms_at
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.pretrained.quantizers import ResidualQuantizer
from tokscale.tokenizers.quantize.base import exact, nearest
from tokscale.tokenizers.quantize.codebook import CodebookQuantizer


class SoftCodesConfig(Config):
    """How codes become distributions."""

    temperature: float = Field(default=0.5, gt=0)
    """By which squared distances are divided, so it goes with the scale of the codebook: near 0 gives the stored codes
    and one-hot targets. The paper: 0.5 on ImageNet."""
    draw: bool = True
    """Draw each code from its distribution, another one in every epoch; false keeps the nearest and only softens the
    targets."""


class SoftCodes:
    """Stored codes to drawn codes and their distributions, on whatever device the codes are.

    The paper starts from the encoder's features. Token shards hold codes alone, so the sum of a place's entries stands
    for its features: what the last level left over is not known, and the last level's distribution is centred on the
    stored entry.

    Args:
        tokenizer: Whose codes are softened.
        config: How.
        seed: Of the draws, which follow from a sample's position alone.

    Raises:
        ConfigError: When its codes are not those of a residual quantizer.
    """

    def __init__(self, tokenizer: FrozenImageTokenizer, config: SoftCodesConfig, seed: int):
        quantizer, kind = getattr(tokenizer.codec, "quantizer", None), getattr(tokenizer.config, "kind", None)
        if not isinstance(quantizer, CodebookQuantizer | ResidualQuantizer) or not quantizer.levels:
            raise ConfigError(
                f"data.soft_codes: the image tokenizer (kind {kind!r}) has no residual quantizer; "
                "leave the key out, or tokenize with an RQ-VAE"
            )
        self.config, self._seed, self._levels = config, seed, quantizer.levels
        self._books = quantizer.entries().detach().float()

    def __call__(
        self, codes: Int[Tensor, "batch grid_h grid_w levels"], positions: Int[Tensor, " batch"]
    ) -> tuple[Int[Tensor, "batch grid_h grid_w levels"], Float[Tensor, "batch grid_h grid_w levels vocab"]]:
        """Codes to train on and the distribution of each.

        Args:
            codes: As stored.
            positions: Of the samples, see `TokenBatch`.
        """
        books, shape = self._books.to(codes.device), codes.shape
        rows = rearrange(codes, "b h w l -> (b h w) l")
        features = torch.stack([F.embedding(rows[:, at], _book(books, at)) for at in range(self._levels)]).sum(dim=0)
        draws = None
        if self.config.draw:
            draws = uniforms_at(positions, codes[0].numel(), self._seed, "soft_codes").view(-1, self._levels)
        drawn, probs = soft_codes(features, books, self._levels, self.config.temperature, draws)
        return drawn.view(shape), probs.view(*shape, books.shape[1])


@torch.no_grad()
def soft_codes(
    features: Float[Tensor, "rows dim"],
    books: Float[Tensor, "books vocab dim"],
    levels: int,
    temperature: float,
    draws: Float[Tensor, "rows levels"] | None = None,
) -> tuple[Int[Tensor, "rows levels"], Float[Tensor, "rows levels vocab"]]:
    """Codes of features and their distributions, level by level.

    Args:
        features: What is quantized.
        books: One codebook for each level, or one for all.
        levels: How many codes each row has.
        temperature: See `SoftCodesConfig`.
        draws: Uniform in [0, 1), one for each code, by which it is drawn; None for the nearest.
    """
    rest, codes, probs = features, [], []
    with exact(features.device):
        for level in range(levels):
            book = _book(books, level)
            # The rows' own lengths are the same for all entries, which the softmax does not see.
            probs.append(((2 * rest @ book.T - book.square().sum(dim=1)) / temperature).softmax(dim=1))
            if draws is None:
                codes.append(nearest(rest, book))
            else:
                below = probs[-1].cumsum(dim=1) <= draws[:, level, None]
                codes.append(below.sum(dim=1).clamp(max=len(book) - 1))
            rest = rest - F.embedding(codes[-1], book)
    return torch.stack(codes, dim=1), torch.stack(probs, dim=1)


def _book(books: Float[Tensor, "books vocab dim"], level: int) -> Float[Tensor, "vocab dim"]:
    return books[level % len(books)]
