"""The network: causal stacks from coarse to fine, each state of one opening a sequence of the next.

Entry `k` of a stage stands for everything below it. The state that predicts it has seen what is before it, and opens
the sequence of its parts in the next stage; the last stage's parts are codes. So code `r` of place `k` is predicted
from all codes of earlier places and from codes before `r` of its own, and from nothing else.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

from tokscale.base.errors import DataError
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.models.grids import Grid
from tokscale.models.rqtransformer.config import HierarchyConfig
from tokscale.nn.attention.decode import DeviceStep
from tokscale.nn.cache import Cache
from tokscale.nn.conditioning import Conditioning, Context
from tokscale.nn.config import StackConfig
from tokscale.nn.head import VocabularyHead
from tokscale.nn.layout import TokenLayout
from tokscale.nn.stack import Stack


class HierarchicalNetwork(nn.Module):
    """Codes to the hidden states that predict them.

    Raises:
        ConfigError: When a size in `config` is not known, see `HierarchyConfig.fitted`.
    """

    def __init__(self, config: HierarchyConfig):
        super().__init__()
        self.config = config
        self.lengths = config.lengths
        tables = 1 if config.shared_code_emb else self.lengths[-1]
        self.code_emb = nn.Embedding(tables * config.codes, config.dim)
        self.opening = Opening(config)
        others = [TokenLayout(config.prefix + 1, *grid) for grid in self.grids]
        self.stages = nn.ModuleList(
            Stage(options, layout, length, () if number else others)
            for number, ((options, layout), length) in enumerate(zip(config.stacks(), self.lengths, strict=True))
        )
        self.head = VocabularyHead(config.dim, config.codes)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Those of a model that knows several; none of one that knows one."""
        return getattr(self.config, "image_grids", ())

    def lengths_of(self, grid: Grid | None) -> tuple[int, ...]:
        """Entries of each stage for images of a grid; the largest where none is given."""
        return self.lengths if grid is None else (grid[0] * grid[1], *self.lengths[1:])

    def layout_of(self, grid: Grid | None) -> TokenLayout:
        """Of the first stage's sequences, likewise."""
        return self._stage(0).stack.layout if grid is None else TokenLayout(self.config.prefix + 1, *grid)

    def structured(self, codes: Int[Tensor, "batch *code_shape"]) -> Int[Tensor, "batch *lengths"]:
        """Codes in any shape, with one axis per stage.

        Flat codes `[batch, n]` may be the first of an image: the last group is filled up with `pad_id`.

        Raises:
            DataError: When there are more than the stages hold, or a shape that is not theirs.
        """
        inner = self.lengths[1:]
        if codes.ndim == 2:
            codes = F.pad(codes, (0, -codes.shape[1] % math.prod(inner)), value=self.config.pad_id)
        shapes = [(*grid, *inner) for grid in self.grids] or [self.lengths, self.config.code_shape]
        if inner == (1,):  # a tokenizer without levels has no axis for them
            shapes += [shape[:-1] for shape in shapes]
        whole = tuple(codes.shape[1:]) in shapes
        groups = codes.flatten(1)
        fits = codes.ndim == 2 or whole or tuple(codes.shape[2:]) == inner
        if not fits or groups.shape[1] > math.prod(self.lengths):
            raise DataError(
                f"codes of shape {tuple(codes.shape[1:])} for a model of {self.config.code_shape}; give those, "
                "or the first of them as one row"
            )
        return groups.unflatten(1, (groups.shape[1] // math.prod(inner), *inner))

    def inputs(
        self,
        codes: Int[Tensor, "rows *entries"],
        *,
        stage: int = 0,
        start: int | Int[Tensor, "1"] = 0,
        grid: Grid | None = None,
    ) -> list[Float[Tensor, "rows *places dim"]]:
        """What the stages from `stage` on read: their entries, embedded.

        Args:
            codes: One axis per stage from `stage` on.
            stage: The coarsest stage asked for.
            start: Where along its own stage's sequence the first axis begins, as a number or as one on the device.
            grid: Of the image, where the model knows several.
        """
        last = len(self.lengths) - 1
        offset = start if stage == last else 0
        levels = offset + torch.arange(codes.shape[-1], device=codes.device)
        real = codes != self.config.pad_id
        ids = codes.long().where(real, 0)
        if not self.config.shared_code_emb:
            ids = ids + levels * self.config.codes
        embedded = self.code_emb(ids) * rearrange(real, "... -> ... 1")
        x = self._stage(last).placed(embedded, offset)
        found = [self._stage(last).placed(embedded.cumsum(-2), offset) if self.config.cumulative_depth else x]
        for number in reversed(range(stage, last)):
            coarser, first = reduce(x, "... n d -> ... d", "sum"), start if number == stage else 0
            x = self._stage(number).placed(coarser, first, None if number else grid)
            found.insert(0, x)
        return found

    def hidden(
        self, codes: Int[Tensor, "batch *lengths"], context: Context | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "batch *lengths dim"]:
        """Hidden states that predict each code, from `structured` codes; the first axis may be shorter.

        Args:
            codes: What is predicted.
            context: What the condition says.
            grid: Of the image, where the model knows several.
        """
        opening = hidden = self.opening(len(codes), context)
        for number, x in enumerate(self.inputs(codes, grid=grid)):
            groups, length = tuple(x.shape[:-2]), x.shape[-2]
            # After the last entry of a sequence nothing of it follows.
            rows = torch.cat([opening, x[..., :-1, :].flatten(0, -3)], dim=1)
            layout = None if number else self.layout_of(grid)
            states = self._stage(number)(rows, layout=layout)[:, -length:]
            opening = rearrange(states, "b n d -> (b n) 1 d")
            hidden = states.unflatten(0, groups)
        return hidden

    def logits(
        self, codes: Int[Tensor, "batch *code_shape"], context: Context | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """A row for each code, and one for the code that follows them where the image goes on.

        Args:
            codes: All codes of an image in any shape, or the first `n` of them as one row.
            context: What the condition says.
            grid: Of the image, where the model knows several.
        """
        given, size = codes.flatten(1), math.prod(self.lengths_of(grid))
        wanted = min(given.shape[1] + 1, size)
        padded = F.pad(given, (0, wanted - given.shape[1]), value=self.config.pad_id)
        hidden = self.hidden(self.structured(padded), context, grid).flatten(1, -2)
        return self.head(hidden[:, :wanted])

    def forward_flops(self) -> float:
        """Floating-point operations of one sample's forward pass (a multiply-add is two).

        Of a model of several grids, their mean.
        """
        found = [self._forward_flops(grid) for grid in self.grids or [None]]
        return sum(found) / len(found)

    def _forward_flops(self, grid: Grid | None) -> float:
        total, count = self.opening.forward_flops(), 1
        for number, length in enumerate(self.lengths_of(grid)):
            stack = self._stage(number).stack
            own = (
                stack.forward_flops(length)
                if number
                else stack.forward_flops(length + self.config.prefix, self.layout_of(grid))
            )
            total += count * own
            count *= length
        return total + 2 * count * self.config.dim * self.config.codes

    def _stage(self, number: int) -> "Stage":
        stage = self.stages[number]
        assert isinstance(stage, Stage)
        return stage


class Stage(nn.Module):
    """One stack of the hierarchy with its own positions and final norm."""

    def __init__(self, config: StackConfig, layout: TokenLayout, length: int, others: Sequence[TokenLayout] = ()):
        super().__init__()
        self.positions = None if config.rotary_emb else nn.Embedding(length, config.dim)
        self.stack = Stack(config, layout, others=others)
        self.norm = nn.LayerNorm(config.dim)

    def placed(
        self,
        x: Float[Tensor, "*groups n dim"],
        start: int | Int[Tensor, "1"] = 0,
        grid: Grid | None = None,
    ) -> Float[Tensor, "*groups n dim"]:
        """Entries with the learned positions from `start` on.

        Of a smaller grid than the largest, those of the same row and column: the table is the largest one's.
        """
        if self.positions is None:
            return x
        places = start + torch.arange(x.shape[-2], device=x.device)
        if grid is not None and grid[1] != self.stack.layout.grid_w:
            rows = torch.div(places, grid[1], rounding_mode="floor")
            places = rows * self.stack.layout.grid_w + places % grid[1]
        return x + self.positions(places)

    def forward(
        self,
        x: Float[Tensor, "rows seq dim"],
        cache: Cache | None = None,
        step: DeviceStep | None = None,
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "rows seq dim"]:
        """States after each position: the whole sequence, or what follows the positions that `cache` has seen.

        With a `step`, that of the one position that it says; see `Stack`.
        """
        return self.norm(self.stack(x, cache=cache, step=step, layout=layout))


class Opening(nn.Module):
    """What the first stage reads before any entry: the condition's states, and a start.

    A state that may not be seen (padding, or a hidden condition) is replaced by a learned one of its position, so that
    every sequence has the same length and no mask.
    """

    def __init__(self, config: HierarchyConfig):
        super().__init__()
        self.dim, self.prefix = config.dim, config.prefix
        self.start = nn.Parameter(torch.randn(config.dim))
        self.conditioning = None
        if config.condition is not None:
            self.conditioning = Conditioning(
                config.condition,
                dim=config.dim,
                num_text_tokens=config.num_text_tokens,
                text_seq_len=config.text_seq_len,
            )
            self.project = nn.Linear(self.conditioning.width, config.dim)
            self.absent = nn.Parameter(torch.randn(config.prefix, config.dim))

    def forward(self, batch: int, context: Context | None) -> Float[Tensor, "batch opening dim"]:
        """The opening of `batch` samples.

        Raises:
            DataError: When the model is conditioned, and no context is given.
        """
        start = repeat(self.start, "d -> b 1 d", b=batch)
        if self.conditioning is None:
            return start
        if context is None:
            raise DataError("this model is conditioned: its first stage needs a context")
        length = self.prefix
        missing = max(length - context.states.shape[1], 0)
        states = F.pad(context.states[:, :length], (0, 0, 0, missing)).to(self.start.dtype)
        seen = F.pad(context.mask[:, :length], (0, missing))
        return torch.cat(
            [torch.where(rearrange(seen, "b n -> b n 1"), self.project(states), self.absent), start], dim=1
        )

    def forward_flops(self) -> float:
        """Floating-point operations of one sample's forward pass."""
        if self.conditioning is None:
            return 0.0
        return self.conditioning.forward_flops() + 2 * self.prefix * self.dim * self.conditioning.width
