"""Parti: captions and image codes to a loss, and captions to images (Yu et al. 2022, arXiv:2206.10789)."""

from collections.abc import Mapping, Sequence

from einops import rearrange

from tokscale.base.batch import LossOutput, TokenBatch
from tokscale.base.rng import uniform_at
from tokscale.base.rows import Rows, matching
from tokscale.base.shapes import Bool, Int, Tensor
from tokscale.models.common import drawing, told_rows
from tokscale.models.grids import Grid
from tokscale.models.model import GenerativeModel
from tokscale.models.parti.config import PartiConfig, PartiSampling
from tokscale.models.parti.network import PartiNetwork
from tokscale.models.parti.sample import sample_codes


class Parti(PartiNetwork, GenerativeModel):
    """The network with its loss and its way of sampling.

    Args:
        config: Options; sizes must be known, see `PartiConfig.fitted`.
    """

    config_class = PartiConfig
    sampling_config = PartiSampling

    @property
    def text_seq_len(self) -> int:
        """Width of the caption ids."""
        return self.config.max_text_len

    def forward(self, batch: TokenBatch) -> LossOutput:
        """The loss of one micro batch: every code from the caption and the codes before it.

        In training, `cond_drop_prob` of the captions are hidden; which ones follows from the samples' positions alone.
        """
        context = self.encode_condition(batch.text, batch.text_mask, batch.extra)
        if self.training:
            context = context.only(self.kept_captions(batch.positions))
        codes, grid = self.flat_codes(batch.codes), self.config.grid_of(batch.codes)
        loss, accuracy = self.head(self.hidden(codes[:, :-1], context, grid), codes)
        return LossOutput(total=loss, parts={"image": loss}, metrics={"image_accuracy": accuracy})

    def kept_captions(self, positions: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Which samples see their captions in training."""
        return uniform_at(positions, 0, "parti", "cond_drop") >= self.config.cond_drop_prob

    def rows(self) -> dict[str, tuple[Rows, ...]]:
        """See `Model.rows`."""
        codes, (height, width) = self.config.sizes
        names = dict(self.named_parameters())
        meanings = told_rows(self.config) | {
            "positions.rows": (Rows("line", (height,)),),
            "positions.cols": (Rows("line", (width,)),),
            "head.weight": (Rows("codes", (codes,)),),
        }
        # Offsets between cells of one grid are none of another.
        bias = {name: (Rows("fresh", (len(p),)),) for name, p in names.items() if name.endswith("bias.table")}
        return matching(list(names), meanings) | bias

    def train_flops(self) -> float:
        """Floating-point operations of one sample's forward and backward pass; of several grids, the mean."""
        flops = []
        for grid in self.config.grids:
            image = grid[0] * grid[1]
            decoder = self.decoder.forward_flops(image, self.config.max_text_len, grid)
            flops.append(3 * (self.condition.forward_flops() + decoder + 2 * image * self.head.weight.numel()))
        return sum(flops) / len(flops)

    def generate_codes(
        self,
        text: Int[Tensor, "batch text"],
        text_mask: Bool[Tensor, "batch text"],
        *,
        options: PartiSampling,
        seeds: Sequence[int],
        extra: Mapping[str, Tensor] | None = None,
        grid: Grid | None = None,
    ) -> Int[Tensor, "batch grid_h grid_w"]:
        """Draw the codes of one image per caption.

        Args:
            text: Caption ids, 0 where padded.
            text_mask: True at real tokens.
            options: How to draw.
            seeds: One per caption: with its own seed, a caption draws the same noise in whatever batch it stands.
            extra: Of a `TokenBatch`: `text_embeds` and its mask where the condition is `embeddings`.
            grid: Rows and columns to draw, where the model knows several.

        Raises:
            ConfigError: When seeds do not match the captions, or the model does not know the grid.
            DataError: When the condition needs an entry that `extra` lacks.
        """
        with drawing(self, seeds, text):
            grid, context = self.config.asked_grid(grid), self.encode_condition(text, text_mask, extra or {})
            codes = sample_codes(self, context, options, seeds, grid)
        return rearrange(codes, "b (h w) -> b h w", h=grid[0])
