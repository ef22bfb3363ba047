"""Two resolutions as one model, and images that are changed."""

from types import SimpleNamespace

import pytest
import torch
from maskgit_models import CODES, GRID, make_batch, sharp

from tokscale.base.batch import LOWRES_CODES, ImageBatch
from tokscale.base.errors import ConfigError, DataError
from tokscale.models.common import token_batch
from tokscale.models.maskgit import MaskGitSampling, Muse
from tokscale.models.maskgit.edit import cells, edit_images
from tokscale.models.maskgit.muse import Asked

HOW = MaskGitSampling(timesteps=3, topk_filter_thres=0.4)
SEEDS = [1, 2, 3, 4]


class Blocks:
    """Codes are the top left pixel of each 2 x 2 block."""

    num_tokens, image_size, channels, code_shape, fingerprint = CODES, 8, 1, GRID, "f" * 64

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, 0, ::2, ::2].long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].to(torch.uint8)


def test_the_base_draws_what_the_other_is_told():
    base, fine, batch = sharp(), sharp(lowres={"image_grid": GRID}), make_batch()
    codes, low = Muse(base, fine).generate_codes(Asked(batch.text, batch.text_mask, {}), options=HOW, seeds=SEEDS)
    assert torch.equal(low, base.generate_codes(batch.text, batch.text_mask, options=HOW, seeds=SEEDS))
    extra = {LOWRES_CODES: low}
    assert torch.equal(codes, fine.generate_codes(batch.text, batch.text_mask, options=HOW, seeds=SEEDS, extra=extra))


def test_models_that_do_not_fit_together_are_named():
    with pytest.raises(ConfigError, match="reads no low-resolution codes"):
        Muse(sharp(), sharp())
    with pytest.raises(ConfigError, match=r"13 codes on a grid of \(2, 2\), but the base draws 13 on \(3, 4\)"):
        Muse(sharp(), sharp(lowres={"image_grid": (2, 2)}))


def test_regions_of_images_become_codes_that_they_touch():
    region = torch.zeros(1, 6, 8, dtype=torch.bool)
    region[0, 1, 3] = region[0, 5, 7] = True
    assert cells(region, GRID).nonzero().tolist() == [[0, 0, 1], [0, 2, 3]]
    with pytest.raises(ConfigError, match="6 x 8 pixels do not divide into 4 x 4 codes"):
        cells(region, (4, 4))


def test_inpainting_leaves_the_pixels_outside_the_region():
    model, batch = sharp(), make_batch()
    pixels = torch.randint(0, CODES, (4, 1, 6, 8)).to(torch.uint8)
    region = torch.zeros(4, 6, 8, dtype=torch.bool)
    region[:, 2:, 4:] = True
    keys = {"text": batch.text, "text_mask": batch.text_mask, "seeds": SEEDS}
    changed = edit_images(model, Blocks(), pixels, region, options=HOW, **keys)
    assert torch.equal(changed[:, 0][~region], pixels[:, 0][~region]) and not torch.equal(changed, pixels)
    edited = edit_images(model, Blocks(), pixels, None, options=HOW.model_copy(update={"edit_iterations": 4}), **keys)
    assert edited.shape == pixels.shape and not torch.equal(edited, Blocks().decode(Blocks().encode(pixels)))


def test_images_become_codes_of_both_resolutions():
    batch = make_batch()
    pixels = torch.randint(0, CODES, (4, 1, 6, 8)).to(torch.uint8)
    low = SimpleNamespace(image_size=4, encode=lambda small: small[:, 0].long())
    made = token_batch(ImageBatch(batch.positions, pixels, text=batch.text, text_mask=batch.text_mask), Blocks(), low)
    assert made.extra[LOWRES_CODES].shape == (4, 4, 4) and torch.equal(made.codes, Blocks().encode(pixels))
    model = sharp(lowres={"image_grid": (4, 4)}).train()
    other = token_batch(ImageBatch(batch.positions, pixels, text=batch.text, text_mask=batch.text_mask), Blocks())
    assert model(made).total.isfinite()
    with pytest.raises(DataError, match="no 'codes"):
        model(other)
