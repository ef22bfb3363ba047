"""Two resolutions: the export of a base model and that of a super-resolution model sample as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokscale.base.config import decode
from tokscale.base.errors import DataError
from tokscale.base.protocols import ImageTokenizer
from tokscale.base.shapes import Tensor, UInt8
from tokscale.inference.asked import asked
from tokscale.inference.pretrained import Pretrained
from tokscale.models.maskgit import Muse
from tokscale.models.maskgit.muse import Asked


@dataclass(frozen=True)
class Cascade:
    """A base model and a super-resolution model, each with tokenizers of its own.

    Args:
        base: Draws the low resolution.
        superres: Was trained on codes of the base's image tokenizer as its `codes.low`.
        sampling: How the second draws; as the first when empty.
    """

    base: Pretrained
    superres: Pretrained
    sampling: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse two that do not belong together.

        Raises:
            ConfigError: When the second is no super-resolution model or of another grid.
            DataError: When it was trained on codes of another tokenizer; names both fingerprints.
        """
        self._muse()
        superres: Any = self.superres.config
        wanted, drawn = superres.lowres.fingerprint, self._low().fingerprint
        if wanted not in (None, drawn):
            raise DataError(
                f"superres: {self.superres.folder} was trained on low-resolution codes of the image tokenizer "
                f"{str(wanted)[:12]}, but {self.base.folder} draws those of {drawn[:12]}; take a base of that tokenizer"
            )

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> UInt8[Tensor, "prompts channels height width"]:
        """Draw one fine image for each prompt; see `Pretrained.sample`."""
        return self.sample_both(prompts, seed=seed, seeds=seeds, batch_size=batch_size, **options)[0]

    def cut_captions(self) -> list[str]:
        """See `Pretrained.cut_captions`; both models read the same prompts."""
        return list(dict.fromkeys(self.base.cut_captions() + self.superres.cut_captions()))

    def sample_both(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> tuple[UInt8[Tensor, "prompts channels height width"], UInt8[Tensor, "prompts channels low_h low_w"]]:
        """Fine images and the low-resolution ones they were drawn from (`return_lowres` of the original)."""
        first: Any = decode(self.base.model.sampling_config, options, where="sampling")
        second: Any = decode(
            self.superres.model.sampling_config, dict(self.sampling) or options, where="superres_sampling"
        )
        muse, fine, low = self._muse(), [], []
        for captions, drawn_from in asked(prompts, seed=seed, seeds=seeds, batch_size=batch_size):
            codes, lowres = muse.generate_codes(
                Asked(*self.base.prompts_with_negative(captions, first)),
                options=first,
                seeds=drawn_from,
                superres_asked=Asked(*self.superres.prompts_with_negative(captions, second)),
                superres_options=second,
            )
            fine.append(self.superres.image_tokenizer.decode(codes).cpu())
            low.append(self._low().decode(lowres).cpu())
        return torch.cat(fine), torch.cat(low)

    def _low(self) -> ImageTokenizer:
        """The base's image tokenizer for what the other model reads."""
        superres: Any = self.superres.config
        of_grid = (each for each in self.base.tokenizers.values() if each.code_shape == superres.lowres.image_grid)
        return next(of_grid, self.base.image_tokenizer)

    def _muse(self) -> Muse:
        models: list[Any] = [self.base.model, self.superres.model]
        return Muse(*models)
