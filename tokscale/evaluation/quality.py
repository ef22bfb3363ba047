"""How much of images a tokenizer keeps: PSNR, SSIM, and the Fréchet distance of features (rFID)."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from tokscale.base.errors import CheckpointError, DataError
from tokscale.base.protocols import ImageTokenizer
from tokscale.base.shapes import Float, Shaped, Tensor, UInt8
from tokscale.tokenizers.pretrained.torchscript import load_program

Images = UInt8[Tensor, "batch channels height width"]
_TOGETHER = 64
"""Images in memory at a time."""
_WINDOW, _SIGMA = 11, 1.5


def reconstructed(tokenizer: ImageTokenizer, images: Images) -> tuple[Shaped[Tensor, "batch *codes"], Images]:
    """Codes of images and what they stand for, a few at a time, on the CPU."""
    codes = [tokenizer.encode(part) for part in images.split(_TOGETHER)]
    rebuilt = torch.cat([tokenizer.decode(part).cpu() for part in codes])
    return torch.cat(codes).cpu(), rebuilt


def quality(images: Images, rebuilt: Images, features: Path | None = None) -> dict[str, float]:
    """`psnr` in dB, `ssim`, and with a feature extractor `rfid`.

    Args:
        images: Any number; an rFID that can be compared with published ones needs tens of thousands.
        rebuilt: Their reconstructions.
        features: A TorchScript program from uint8 RGB images to one vector each, such as the Inception network of
            StyleGAN's `inception-2015-12-05.pt`, whose `return_features` is set.

    Raises:
        CheckpointError: When the extractor cannot be read, or gives something else.
        DataError: When there are too few images for a Fréchet distance.
    """
    found = {"psnr": psnr(images, rebuilt), "ssim": ssim(images, rebuilt)}
    if features is not None:
        program = load_program(features)
        found["rfid"] = frechet_distance(_features(program, images, features), _features(program, rebuilt, features))
    return found


def psnr(images: Images, rebuilt: Images) -> float:
    """Peak signal-to-noise ratio in dB over all images together."""
    error: Float[Tensor, ""] = (images.float() - rebuilt.float()).square().mean()
    return (10 * torch.log10(255**2 / error.clamp_min(1e-12))).item()


def ssim(images: Images, rebuilt: Images) -> float:
    """Mean structural similarity (Wang et al. 2004): Gaussian windows of 11 pixels, smaller in smaller images.

    Windows around every pixel, the image mirrored beyond its border, as torchmetrics has it.
    """
    parts = zip(images.split(_TOGETHER), rebuilt.split(_TOGETHER), strict=True)
    total = sum(_ssim_map(a.double(), b.double()).mean(dim=(1, 2, 3)).sum().item() for a, b in parts)
    return total / len(images)


def _ssim_map(
    a: Float[Tensor, "batch channels height width"], b: Float[Tensor, "batch channels height width"]
) -> Tensor:
    channels, side = a.shape[1], min(_WINDOW, *(size - 1 + size % 2 for size in a.shape[-2:]))
    places = torch.arange(side, dtype=a.dtype) - (side - 1) / 2
    window = torch.softmax(-places.square() / (2 * _SIGMA**2), dim=0)
    rows = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)

    def local(x: Tensor) -> Tensor:
        x = F.pad(x, [side // 2] * 4, mode="reflect")
        return F.conv2d(F.conv2d(x, rows, groups=channels), columns, groups=channels)

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    both = local(a * b) - mean_a * mean_b
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * mean_a * mean_b + one) * (2 * both + two) / ((mean_a**2 + mean_b**2 + one) * (var_a + var_b + two))


def frechet_distance(a: Float[Tensor, "batch dim"], b: Float[Tensor, "others dim"]) -> float:
    """Squared Wasserstein distance between the normal distributions of two sets of vectors (Heusel et al. 2017).

    Raises:
        DataError: When a set has fewer than two vectors.
    """
    if min(len(a), len(b)) < 2:
        raise DataError(f"a Fréchet distance of {len(a)} and {len(b)} images; give at least two of each")
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # The product of the covariances has the eigenvalues of this symmetric matrix.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * cross).item()


@torch.inference_mode()
def _features(program: torch.jit.ScriptModule, images: Images, path: Path) -> Float[Tensor, "batch dim"]:
    forward: Any = program.forward
    named = {argument.name for argument in forward.schema.arguments}
    options = {"return_features": True} if "return_features" in named else {}
    found = []
    for part in images.split(_TOGETHER):
        rgb = part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part[:, :3]
        given = program(rgb.contiguous(), **options)
        if not isinstance(given, Tensor) or len(given) != len(part):
            raise CheckpointError(f"{path}: gives {type(given).__name__} for {len(part)} images, not a vector each")
        found.append(rearrange(given.float(), "b ... -> b (...)"))
    return torch.cat(found)
