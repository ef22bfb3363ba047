"""DALL-E: captions and image codes to a loss, and captions to images (Ramesh et al. 2021, arXiv:2102.12092)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange

from tokscale.base.batch import LossOutput, TokenBatch
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.base.rng import uniform_at
from tokscale.base.rows import Rows, matching
from tokscale.base.shapes import Bool, Float, Int, Tensor, UInt8
from tokscale.models.common import Reranker, drawing
from tokscale.models.dalle.config import DALLEConfig, DALLESampling
from tokscale.models.dalle.network import DALLENetwork
from tokscale.models.dalle.sample import init_codes, sample_codes, sample_text
from tokscale.models.grids import Grid
from tokscale.models.model import GenerativeModel


@dataclass(frozen=True)
class GeneratedImages:
    """Images drawn from captions."""

    codes: Int[Tensor, "batch grid_h grid_w"]
    pixels: UInt8[Tensor, "batch channels height width"]
    scores: Float[Tensor, " batch"] | None = None
    """How well each image fits its caption, where a reranker was given."""


class DALLE(DALLENetwork, GenerativeModel):
    """The network with its loss and its ways of sampling.

    Args:
        config: Options; sizes must be known, see `DALLEConfig.fitted`.
    """

    config_class = DALLEConfig
    sampling_config = DALLESampling

    @property
    def text_seq_len(self) -> int:
        """Width of the caption ids."""
        return self.config.text_seq_len

    def forward(self, batch: TokenBatch) -> LossOutput:
        """The loss of one micro batch: text logits at text positions, code logits at image positions.

        In training, `null_cond_prob` of the captions count as empty; which ones follows from the samples' positions
        alone. The batch itself is never changed.
        """
        mask = batch.text_mask
        if self.training:
            mask = mask & rearrange(self.kept_captions(batch.positions), "b -> b 1")
        ids, codes = self.text_ids(batch.text, mask), self.flat_codes(batch.codes)
        layout, length = self.layout_of(self.config.grid_of(batch.codes)), self.config.text_seq_len
        hidden, weight = self.hidden(ids, codes, layout), self.config.loss_img_weight
        text_loss, text_accuracy = self.text_head(hidden[:, :length], ids[:, 1:])
        image_loss, image_accuracy = self.image_head(hidden[:, length:], codes)
        return LossOutput(
            total=(text_loss + weight * image_loss) / (weight + 1),
            parts={"text": text_loss, "image": image_loss},
            weights={"text": 1 / (weight + 1), "image": weight / (weight + 1)},
            metrics={"text_accuracy": text_accuracy, "image_accuracy": image_accuracy},
        )

    def kept_captions(self, positions: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Which samples keep their captions in training."""
        return uniform_at(positions, 0, "dalle", "null_cond") >= self.config.null_cond_prob

    def rows(self) -> dict[str, tuple[Rows, ...]]:
        """See `Model.rows`."""
        length, height, width = self.config.text_seq_len, self.layout.grid_h, self.layout.grid_w
        text = (Rows("words", (self.words,)), Rows("places", (length,)))
        codes = (Rows("codes", (self.codes,)),)
        meanings = {f"text_{part}": text for part in ("emb.weight", "head.weight", "head.bias")}
        meanings |= {f"image_{part}": codes for part in ("emb.weight", "head.weight", "head.bias")}
        meanings |= {
            "positions.text": (Rows("places", (length + 1,)),),
            "positions.rows": (Rows("line", (height,)),),
            "positions.cols": (Rows("line", (width,)),),
        }
        return matching([name for name, _ in self.named_parameters()], meanings)

    def train_flops(self) -> float:
        """Floating-point operations of one sample's forward and backward pass; of several grids, the mean."""
        text, flops = self.config.text_seq_len, []
        for layout in map(self.layout_of, self.config.grids):
            heads = 2 * self.config.dim * (text * (self.words + text) + layout.image * self.codes)
            flops.append(3 * (self.stack.forward_flops(text + layout.image, layout) + heads))
        return sum(flops) / len(flops)

    def generate_codes(
        self,
        text: Int[Tensor, "batch text"],
        text_mask: Bool[Tensor, "batch text"],
        *,
        options: DALLESampling,
        seeds: Sequence[int],
        extra: Mapping[str, Tensor] | None = None,
        grid: Grid | None = None,
        img: Int[Tensor, "batch *code_shape"] | None = None,
    ) -> Int[Tensor, "batch grid_h grid_w"]:
        """Draw the codes of one image per caption.

        Args:
            text: Caption ids, 0 where padded.
            text_mask: True at real tokens.
            options: How to draw.
            seeds: One per caption: with its own seed, a caption draws the same noise in whatever batch it stands.
            extra: Not needed: this model reads caption ids alone.
            grid: Rows and columns to draw, where the model knows several.
            img: Codes of priming images, of which the first ones are kept.

        Raises:
            ConfigError: When seeds do not match the captions, priming leaves no code to draw, or the model does not
                know the grid.
        """
        del extra
        with drawing(self, seeds, text):
            prime = text.new_zeros(len(text), 0)
            layout = self.layout_of(self.config.asked_grid(grid if img is None else self.config.grid_of(img)))
            if grid not in (None, (layout.grid_h, layout.grid_w)):
                raise ConfigError(f"img: codes of {layout.grid_h} x {layout.grid_w} cannot prime a grid of {grid}")
            if img is not None:
                prime = self.flat_codes(img)[:, : init_codes(layout, options)]
            codes = sample_codes(self, text, text_mask, prime, options, seeds, layout)
        return rearrange(codes, "b (h w) -> b h w", h=layout.grid_h)

    def generate_images(
        self,
        text: Int[Tensor, "batch text"],
        text_mask: Bool[Tensor, "batch text"],
        tokenizer: ImageTokenizer,
        *,
        options: DALLESampling,
        seeds: Sequence[int],
        grid: Grid | None = None,
        img: Tensor | None = None,
        clip: Reranker | None = None,
    ) -> GeneratedImages:
        """Draw one image per caption.

        Args:
            text: Caption ids, 0 where padded.
            text_mask: True at real tokens.
            tokenizer: Decodes the codes; the one this model's codes came from, for images of this grid.
            options: How to draw.
            seeds: One per caption.
            grid: See `generate_codes`.
            img: Priming images, as `uint8` pixels `[batch, channels, height, width]` or as codes.
            clip: Scores the images.
        """
        if img is not None and img.dtype == torch.uint8:
            img = tokenizer.encode(img)
        codes = self.generate_codes(text, text_mask, options=options, seeds=seeds, grid=grid, img=img)
        pixels = tokenizer.decode(codes)
        return GeneratedImages(codes, pixels, None if clip is None else clip.score(text, text_mask, pixels))

    def generate_texts(
        self,
        tokenizer: TextTokenizer,
        prompts: Sequence[str],
        *,
        options: DALLESampling,
        seeds: Sequence[int],
    ) -> tuple[Int[Tensor, "batch text"], list[str]]:
        """Go on from captions' beginnings.

        Args:
            tokenizer: The one this model's ids came from.
            prompts: Beginnings; an empty one draws a caption from nothing.
            options: How to draw; guidance and priming do not apply to text.
            seeds: One per prompt.

        Returns:
            Ids, right-padded with 0, and the captions they decode to.
        """
        with drawing(self, seeds, prompts):
            prefix, mask = tokenizer.encode(prompts, self.config.text_seq_len)
            prefix = torch.where(mask, prefix, 0).to(self.norm.weight.device)
            ids = sample_text(self, prefix, options, seeds)
        return ids, tokenizer.decode(ids)
