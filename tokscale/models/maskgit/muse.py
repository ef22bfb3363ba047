"""Muse: a base model draws low-resolution codes, and a super-resolution model draws a finer image beside them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokscale.base.batch import LOWRES_CODES
from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Bool, Int, Tensor
from tokscale.models.maskgit.config import MaskGitSampling
from tokscale.models.maskgit.model import MaskGit


class Asked(NamedTuple):
    """What one of the two models is told, in the terms of its own tokenizers."""

    text: Int[Tensor, "batch text"]
    text_mask: Bool[Tensor, "batch text"]
    extra: Mapping[str, Tensor]


class Muse:
    """The two models as one.

    Args:
        base: Draws the low resolution.
        superres: Was trained on codes of the base's image tokenizer as its `codes.low`.

    Raises:
        ConfigError: When the second is no super-resolution model, or one of another grid or codebook.
    """

    def __init__(self, base: MaskGit, superres: MaskGit):
        lowres = superres.config.lowres
        if lowres is None:
            raise ConfigError("superres: this model reads no low-resolution codes; train one with model.lowres")
        told = (lowres.num_tokens or superres.transformer.num_tokens, lowres.image_grid)
        drawn = (base.transformer.num_tokens, base.config.grids[0])
        if told not in [(drawn[0], grid) for grid in base.config.grids]:
            raise ConfigError(
                f"superres: this model reads {told[0]} codes on a grid of {told[1]}, but the base draws {drawn[0]} on "
                f"{drawn[1]}; take the base whose image tokenizer made the stream {LOWRES_CODES!r}"
            )
        self.base, self.superres, self._low = base, superres, lowres.image_grid

    def generate_codes(
        self,
        asked: Asked,
        *,
        options: MaskGitSampling,
        seeds: Sequence[int],
        superres_asked: Asked | None = None,
        superres_options: MaskGitSampling | None = None,
    ) -> tuple[Int[Tensor, "batch grid_h grid_w"], Int[Tensor, "batch low_h low_w"]]:
        """Draw both resolutions.

        Args:
            asked: What the base is told.
            options: How it draws.
            seeds: One per image, for both models.
            superres_asked: What the other is told beside the low resolution; the same when left out.
            superres_options: How it draws; likewise.

        Returns:
            Codes of the fine images, and those of the low resolution.
        """
        text, mask, extra = asked
        lowres = self.base.generate_codes(text, mask, options=options, seeds=seeds, extra=extra, grid=self._low)
        text, mask, extra = superres_asked or asked
        fine = self.superres.generate_codes(
            text, mask, options=superres_options or options, seeds=seeds, extra={**extra, LOWRES_CODES: lowres}
        )
        return fine, lowres
