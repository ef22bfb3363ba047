"""The network of DALL-E: which entry stands where in the sequence, and what the transformer makes of it."""

import torch
from einops import rearrange
from torch import nn

from tokscale.base.errors import DataError
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.models.dalle.config import DALLEConfig
from tokscale.models.grids import Grid, first
from tokscale.nn.attention.decode import DeviceStep
from tokscale.nn.cache import Cache
from tokscale.nn.head import VocabularyHead
from tokscale.nn.layout import TokenLayout
from tokscale.nn.stack import Stack

START = 0
"""Id of the start token: row 0 of the text vocabulary. Padding, the tokenizer's id 0, has ids of its own."""


class DALLENetwork(nn.Module):
    """`[start, caption, codes]` through one causal stack, to hidden states that predict the next entry.

    Position `i` predicts entry `i + 1`: the first `text_seq_len` positions predict text, all others codes, so each part
    has its own output head, and nothing is ever projected onto the entries that cannot follow.

    Raises:
        ConfigError: When a size in `config` is not known, see `DALLEConfig.fitted`.
    """

    def __init__(self, config: DALLEConfig):
        super().__init__()
        self.words, self.codes, grid = config.sizes
        self.config = config
        self.layout = TokenLayout(config.text_seq_len + 1, *grid)
        vocab, tied = self.words + config.text_seq_len, config.share_input_output_emb
        self.text_emb = None if tied else nn.Embedding(vocab, config.dim)
        self.image_emb = None if tied else nn.Embedding(self.codes, config.dim)
        self.positions = None if config.rotary_emb else PositionEmbedding(config.dim, self.layout)
        self.stack = Stack(config, self.layout, others=[self.layout_of(grid) for grid in config.image_grids])
        self.norm = nn.LayerNorm(config.dim)
        self.text_head = VocabularyHead(config.dim, vocab, tied=tied)
        self.image_head = VocabularyHead(config.dim, self.codes, tied=tied)

    def layout_of(self, grid: Grid) -> TokenLayout:
        """Of a sequence whose image has this grid; `layout` itself is that of the largest."""
        return TokenLayout(self.layout.text, *grid)

    def text_ids(
        self, text: Int[Tensor, "batch text"], mask: Bool[Tensor, "batch text"] | None = None
    ) -> Int[Tensor, "batch start_and_text"]:
        """The start token, then the caption; padding at caption position `p` gets the id `words + p`.

        Args:
            text: Ids of the text tokenizer, 0 where padded.
            mask: True at real tokens; where id 0 stands when left out.

        Raises:
            DataError: When captions have another length than the model's.
        """
        length = self.config.text_seq_len
        if text.shape[1] != length:
            raise DataError(f"captions of {text.shape[1]} ids for a model with text_seq_len={length}; pad them to it")
        pads = torch.arange(self.words, self.words + length, device=text.device, dtype=text.dtype)
        real = text != 0 if mask is None else mask & (text != 0)
        return nn.functional.pad(torch.where(real, text, pads), (1, 0), value=START)

    def flat_codes(self, codes: Int[Tensor, "batch *code_shape"]) -> Int[Tensor, "batch image"]:
        """All codes of each image in raster order.

        Raises:
            DataError: When there are more or fewer than the grid holds, or the model knows several and not this one.
        """
        rows, columns = self.config.grid_of(codes)
        flat = codes.flatten(1)
        if flat.shape[1] != rows * columns:
            raise DataError(f"codes of shape {tuple(codes.shape[1:])} for a model with image_grid={(rows, columns)}")
        return flat

    def embed_text(
        self, ids: Int[Tensor, "batch n"], start: int | Int[Tensor, "1"] = 0
    ) -> Float[Tensor, "batch n dim"]:
        """Embeddings of `text_ids` that stand from sequence position `start` on; of one if a tensor says where."""
        table = self.text_head if self.text_emb is None else self.text_emb
        return self._placed(table(ids), start)

    def embed_codes(
        self, codes: Int[Tensor, "batch n"], start: int | Int[Tensor, "1"] = 0, layout: TokenLayout | None = None
    ) -> Float[Tensor, "batch n dim"]:
        """Embeddings of codes that stand from raster position `start` on; of one code if a tensor says where."""
        table = self.image_head if self.image_emb is None else self.image_emb
        return self._placed(table(codes), self.layout.text + start, layout)

    def read(
        self,
        x: Float[Tensor, "batch seq dim"],
        cache: Cache | None = None,
        step: DeviceStep | None = None,
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Hidden states, normalised for the heads.

        Args:
            x: Embeddings: the whole sequence, or what follows the entries that `cache` has seen.
            cache: Updated in place.
            step: Where the one entry stands, if not next in the cache.
            layout: The sequence's, where it is not that of the largest grid; a cache knows it.
        """
        if self.config.stable:
            x = x * 0.1 + x.detach() * 0.9  # the value is unchanged, the embeddings' gradient is a tenth (CogView)
        x = self.stack(x, cache=cache, step=step, layout=layout)
        if self.config.stable:
            # Magnitudes: dividing by a negative or zero maximum would flip or destroy the row.
            x = x / x.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        return self.norm(x)

    def hidden(
        self,
        ids: Int[Tensor, "batch start_and_text"],
        codes: Int[Tensor, "batch n"],
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Hidden states of every position that predicts something: after the last code nothing follows."""
        layout = layout or self.layout
        codes = codes[:, : layout.image - 1]
        parts = [self.embed_text(ids)] + ([self.embed_codes(codes, layout=layout)] if codes.shape[1] else [])
        return self.read(torch.cat(parts, dim=1), layout=layout)

    def logits(
        self,
        text: Int[Tensor, "batch text"],
        codes: Int[Tensor, "batch *code_shape"],
        grid: Grid | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """The original's joint logits, text entries before codes; entries that cannot follow have the lowest number.

        Args:
            text: Caption ids, 0 where padded.
            codes: The image's codes, or the first of them in raster order.
            grid: Of the image, where the model knows several; the largest when left out.

        Returns:
            A row for each position that predicts something.
        """
        layout = self.layout if grid is None else self.layout_of(grid)
        hidden = self.hidden(self.text_ids(text), codes.flatten(1), layout)
        length = self.config.text_seq_len
        text_logits, image_logits = self.text_head(hidden[:, :length]), self.image_head(hidden[:, length:])
        vocab = text_logits.shape[-1]
        joint = hidden.new_full((*hidden.shape[:2], vocab + self.codes), torch.finfo(hidden.dtype).min)
        joint[:, :length, :vocab] = text_logits
        joint[:, length:, vocab:] = image_logits
        return joint

    def _placed(self, x: Tensor, start: int | Tensor, layout: TokenLayout | None = None) -> Tensor:
        if self.positions is None:
            return x
        return x + self.positions(start, start + x.shape[1], layout or self.layout)


class PositionEmbedding(nn.Module):
    """Learned positions: a table for the text, and for the image the sum of a row's and a column's vector.

    Of a smaller grid than the tables', the first rows and columns.
    """

    def __init__(self, dim: int, layout: TokenLayout):
        super().__init__()
        self.text = nn.Parameter(torch.randn(layout.text, dim))
        self.rows = nn.Parameter(torch.randn(layout.grid_h, dim))
        self.cols = nn.Parameter(torch.randn(layout.grid_w, dim))

    def forward(
        self, start: int | Int[Tensor, "1"], stop: int | Int[Tensor, "1"], layout: TokenLayout
    ) -> Float[Tensor, "n dim"]:
        """Vectors of the sequence positions `start ... stop - 1`; of one position if it is a tensor."""
        rows, cols = first(self.rows, layout.grid_h), first(self.cols, layout.grid_w)
        grid = rearrange(rows, "h d -> h 1 d") + rearrange(cols, "w d -> 1 w d")
        every = torch.cat([self.text, rearrange(grid, "h w d -> (h w) d")])
        return every.index_select(0, start) if isinstance(start, Tensor) else every[start:stop]
