"""The network of Parti: what the decoder is told, what it reads, and the logits it gives."""

from collections.abc import Mapping

import torch
from einops import rearrange, repeat
from torch import nn

from tokscale.base.errors import ConfigError, DataError
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.models.grids import Grid, first
from tokscale.models.parti.config import PartiConfig
from tokscale.models.parti.decoder import CodeDecoder
from tokscale.nn.conditioning import Conditioning, Context
from tokscale.nn.head import VocabularyHead


class PartiNetwork(nn.Module):
    """`[start, codes]` through a causal decoder that attends to a caption, to logits of the code that follows.

    Position `i` predicts code `i`. Embeddings are tied to the output weights.

    Raises:
        ConfigError: When a size in `config` is not known, see `PartiConfig.fitted`.
    """

    def __init__(self, config: PartiConfig):
        super().__init__()
        codes, self.grid = config.sizes
        self.config = config
        self.condition = Conditioning(
            config.condition,
            dim=config.dim,
            num_text_tokens=config.num_text_tokens,
            text_seq_len=config.max_text_len,
        )
        self.positions = GridEmbedding(config.dim, self.grid)
        self.init_norm = nn.LayerNorm(config.dim, bias=False)
        self.decoder = CodeDecoder(config, self.grid, self.condition.width)
        self.head = VocabularyHead(config.dim, codes, tied=True, bias=False)

    def encode_condition(
        self, text: Int[Tensor, "batch text"], text_mask: Bool[Tensor, "batch text"], extra: Mapping[str, Tensor]
    ) -> Context:
        """The caption's states, cut to `max_text_len`."""
        states, mask = self.condition(text, text_mask, extra)
        return Context(states[:, : self.config.max_text_len], mask[:, : self.config.max_text_len])

    def embed(
        self, codes: Int[Tensor, "batch n"], start: int | Int[Tensor, "1"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "batch some dim"]:
        """The start token and the first codes, or codes from raster position `start` on, as the decoder reads them.

        Where a tensor says the position, it is one code's.
        """
        positions = self.positions(grid or self.grid)
        if isinstance(start, Tensor):
            return self.init_norm(self.head(codes) + positions.index_select(0, start + 1))
        placed = self.head(codes) + positions[1:][start or 0 :][: codes.shape[1]]
        if start is None:
            placed = torch.cat([repeat(positions[0], "d -> b 1 d", b=len(codes)), placed], dim=1)
        return self.init_norm(placed)

    def hidden(
        self, codes: Int[Tensor, "batch n"], context: Context, grid: Grid | None = None
    ) -> Float[Tensor, "batch some dim"]:
        """Hidden states after the start token and each code; `grid` where it is not the largest.

        Raises:
            ConfigError: When all codes are given to a network that has no place for the last one.
        """
        rows, columns = grid or self.grid
        if codes.shape[1] == rows * columns and self.config.rel_pos_index == "sequence" and self.config.rel_pos_bias:
            raise ConfigError(
                f"model.rel_pos_index=sequence has {rows * columns} places for the start token and codes, one too few "
                "for a whole image; leave out the last code, or use model.rel_pos_index=raster"
            )
        return self.decoder(self.embed(codes, grid=grid), context, grid)

    def logits(
        self, codes: Int[Tensor, "batch n"], context: Context, grid: Grid | None = None
    ) -> Float[Tensor, "batch some codes"]:
        """Logits after the start token and each code: the code that follows. `n` may be 0, or all codes."""
        return self.head(self.hidden(codes, context, grid))

    def logits_with_cond_scale(
        self, codes: Int[Tensor, "batch n"], context: Context, cond_scale: float, grid: Grid | None = None
    ) -> Float[Tensor, "batch some codes"]:
        """Guided logits, computed whole: what drawing step by step is tested against."""
        logits = self.logits(codes, context, grid)
        if cond_scale == 1:
            return logits
        null = self.logits(codes, context.only(torch.zeros_like(context.mask[:, 0])), grid)
        return null + (logits - null) * cond_scale

    def flat_codes(self, codes: Int[Tensor, "batch *code_shape"]) -> Int[Tensor, "batch image"]:
        """All codes of each image in raster order.

        Raises:
            DataError: When there are more or fewer than the grid holds, or the model knows several and not this one.
        """
        flat, (rows, columns) = codes.flatten(1), self.config.grid_of(codes)
        if flat.shape[1] != rows * columns:
            raise DataError(f"codes of shape {tuple(codes.shape[1:])} for a model with image_grid={(rows, columns)}")
        return flat


class GridEmbedding(nn.Module):
    """The start token, and for each code the sum of its row's and its column's vector."""

    def __init__(self, dim: int, grid: Grid):
        super().__init__()
        # As small as the embeddings of codes, to which they are added: a norm follows.
        std = dim**-0.5
        self.start = nn.Parameter(torch.randn(dim) * std)
        self.rows = nn.Parameter(torch.randn(grid[0], dim) * std)
        self.cols = nn.Parameter(torch.randn(grid[1], dim) * std)

    def forward(self, grid: Grid) -> Float[Tensor, "start_and_image dim"]:
        """The start token, then every place of a grid in raster order: the first rows and columns of the tables."""
        rows, cols = first(self.rows, grid[0]), first(self.cols, grid[1])
        places = rearrange(rows, "h d -> h 1 d") + rearrange(cols, "w d -> 1 w d")
        return torch.cat([rearrange(self.start, "d -> 1 d"), rearrange(places, "h w d -> (h w) d")])
