"""The transformer of MaskGIT: embedded codes through the layers, beside a context of text and low-resolution codes."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn

from tokscale.base.batch import LOWRES_CODES
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.models.grids import Grid
from tokscale.models.maskgit.config import BlocksConfig, LowresConfig, MaskGitConfig
from tokscale.models.maskgit.layers import FeedForward, Memory, TransformerBlocks
from tokscale.nn.conditioning import Conditioning, Context
from tokscale.nn.head import VocabularyHead


class ConditioningInputs(NamedTuple):
    """What a batch says beside its codes. The parts are apart, since guidance hides the text alone."""

    text: Context
    lowres: Int[Tensor, "batch lowres"] | None


class Transformer(nn.Module):
    """Codes, some of them masked, to hidden states; and those to logits.

    Args:
        config: The model's options; sizes must be known, see `MaskGitConfig.fitted`.
        blocks: Sizes of the layers, where they are not the model's own (a critic).
        context_width: Of the text's states.
        dim_out: Entries of the output; the codebook when left out.
        self_cond: Whether hidden states of an earlier look are fed back.
        add_mask_id: Whether the embedding has an entry for masked codes, which is never predicted.
    """

    def __init__(
        self,
        config: MaskGitConfig,
        blocks: BlocksConfig,
        context_width: int,
        *,
        dim_out: int | None = None,
        self_cond: bool = False,
        add_mask_id: bool = False,
    ):
        super().__init__()
        self.num_tokens, grid = config.sizes
        self.grid, self.seq_len, self.dim = grid, grid[0] * grid[1], blocks.dim
        self.token_emb = nn.Embedding(self.num_tokens + add_mask_id, self.dim)
        self.pos_emb = nn.Embedding(self.seq_len, self.dim)
        same = context_width == self.dim
        self.text_embed_proj = nn.Identity() if same else nn.Linear(context_width, self.dim, bias=False)
        self.lowres = None if config.lowres is None else LowresReader(config.lowres, blocks, self.num_tokens)
        self.self_cond_to_init_embed = FeedForward(self.dim) if self_cond else None
        self.transformer_blocks = TransformerBlocks(blocks)
        self.to_logits = VocabularyHead(
            self.dim,
            dim_out or self.num_tokens,
            bias=False,
            label_smoothing=config.label_smoothing if not dim_out else 0,
        )

    def forward(
        self,
        ids: Int[Tensor, "batch image"],
        context: Context | list[Memory],
        self_cond_embed: Float[Tensor, "batch image dim"] | None = None,
        places: Bool[Tensor, "batch image"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "*places dim"]:
        """Hidden states, normalised for the head.

        Args:
            ids: Codes, `num_tokens` where they are masked.
            context: See `context` and `memories`.
            self_cond_embed: Hidden states of an earlier look; zeros when left out, and not read without `self_cond`.
            places: Where states are wanted, which come as one row for each, in order; everywhere when left out.
            grid: Of the codes, where it is not the largest.
        """
        x = self.token_emb(ids) + self.pos_emb(self._rows_of(grid or self.grid, ids.device))
        if self.self_cond_to_init_embed is not None:
            given = torch.zeros_like(x) if self_cond_embed is None else self_cond_embed
            x = x + self.self_cond_to_init_embed(given)
        return self.transformer_blocks(x, context, places)

    def _rows_of(self, grid: Grid, device: torch.device) -> Int[Tensor, " image"]:
        """Where the places of a grid stand in the table, which is the largest one's in raster order."""
        height, width = grid
        if width == self.grid[1]:
            return torch.arange(height * width, device=device)
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        return (rows[:, None] * self.grid[1] + columns).flatten()

    def context(self, inputs: ConditioningInputs) -> Context:
        """What the layers attend to: the text's states, then the low-resolution image."""
        states = self.text_embed_proj(inputs.text.states.to(self.pos_emb.weight.dtype))
        if self.lowres is None:
            return Context(states, inputs.text.mask)
        if inputs.lowres is None:
            raise DataError(
                f"the batch has no {LOWRES_CODES!r}, which a super-resolution model is conditioned on; tokenize with "
                "streams.low, or give the images' low-resolution codes"
            )
        beside = self.lowres(inputs.lowres, self.token_emb)
        mask = torch.cat([inputs.text.mask, torch.ones_like(inputs.lowres, dtype=torch.bool)], dim=1)
        return Context(torch.cat([states, beside], dim=1), mask)

    def text_hidden(self, context: Context, kept: Bool[Tensor, " batch"]) -> Context:
        """The same context, with the text hidden from the samples that are not kept; low-resolution codes stay."""
        beside = 0 if self.lowres is None else self.lowres.count
        seen = torch.ones_like(context.mask)
        seen[:, : seen.shape[1] - beside] = rearrange(kept, "b -> b 1")
        return Context(context.states, context.mask & seen)

    def forward_flops(self, words: int, wanted: float = 1.0, count: int | None = None) -> float:
        """Floating-point operations of one sample's pass without the head.

        Args:
            words: Width of the text.
            wanted: Share of the codes whose states are wanted.
            count: Codes; those of the largest grid when left out.
        """
        context, extra = words, 0.0
        if self.lowres is not None:
            context += self.lowres.count
            extra = self.lowres.forward_flops()
        return self.transformer_blocks.forward_flops(count or self.seq_len, context, wanted) + extra


class LowresReader(nn.Module):
    """Low-resolution codes as states: embedding, their own rows, columns and scale, and with `encoder` some layers.

    Without positions of their own the codes would be a bag, whatever their order (a defect of the original).
    """

    def __init__(self, config: LowresConfig, blocks: BlocksConfig, num_tokens: int):
        super().__init__()
        if config.image_grid is None:
            raise ConfigError("model.lowres.image_grid is not known yet; give it, or train on data with codes.low")
        self.config, self.grid, dim = config, config.image_grid, blocks.dim
        self.count = self.grid[0] * self.grid[1]
        self.embedding = None if config.shared_emb else nn.Embedding(config.num_tokens or num_tokens, dim)
        self.rows = nn.Embedding(self.grid[0], dim)
        self.cols = nn.Embedding(self.grid[1], dim)
        self.scale = nn.Parameter(torch.randn(dim))
        self.encoder = None
        if config.layout == "encoder":
            self.encoder = TransformerBlocks(blocks.model_copy(update={"depth": config.depth}), cross_attend=False)

    def forward(self, codes: Int[Tensor, "batch lowres"], shared: nn.Embedding) -> Float[Tensor, "batch lowres dim"]:
        """States of flat codes.

        Args:
            codes: In raster order.
            shared: The model's own embedding, for `shared_emb`.
        """
        if codes.shape[1] != self.count:
            raise DataError(
                f"{codes.shape[1]} low-resolution codes for a model with lowres.image_grid={self.grid}; "
                "take the tokenizer that the model was made for"
            )
        height, width = self.grid
        rows = self.rows(torch.arange(height, device=codes.device))
        cols = self.cols(torch.arange(width, device=codes.device))
        places = rearrange(rows, "h d -> h 1 d") + rearrange(cols, "w d -> 1 w d")
        table = shared if self.embedding is None else self.embedding
        x = table(codes) + rearrange(places, "h w d -> (h w) d") + self.scale
        return x if self.encoder is None else self.encoder(x)

    def forward_flops(self) -> float:
        """Floating-point operations of one sample's forward pass."""
        return 0.0 if self.encoder is None else self.encoder.forward_flops(self.count)


class ConditioningEncoder(nn.Module):
    """From a batch to what it says: text, embeddings or a class, and low-resolution codes."""

    def __init__(self, config: MaskGitConfig):
        super().__init__()
        self.config = config
        self.conditioning = Conditioning(
            config.condition,
            dim=config.dim,
            num_text_tokens=config.num_text_tokens,
            text_seq_len=config.text_seq_len,
        )
        self.width = self.conditioning.width

    def forward(
        self, text: Int[Tensor, "batch text"], text_mask: Bool[Tensor, "batch text"], extra: Mapping[str, Tensor]
    ) -> ConditioningInputs:
        """See `Conditioning`; low-resolution codes are read where the model is one of super-resolution.

        Raises:
            DataError: When an entry is missing.
        """
        lowres = extra.get(LOWRES_CODES) if self.config.lowres is not None else None
        return ConditioningInputs(
            self.conditioning(text, text_mask, extra), None if lowres is None else lowres.flatten(1)
        )
