"""The perceptual loss: distance between features of VGG16, whose weights come by local path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from tokscale.base.config import Config, PathKey
from tokscale.base.errors import CheckpointError
from tokscale.base.shapes import Float, Tensor
from tokscale.nn.constants import constant
from tokscale.tokenizers.pretrained.checkpoint_files import read_tensors

Images = Float[Tensor, "batch channels height width"]
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions between its poolings; features are taken after the last of each stage."""


class PerceptualConfig(Config):
    """Which weights, and how much they count."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the loss. taming: 1; ViT-VQGAN: 0.1; Muse: 0.05."""
    vgg: PathKey
    """VGG16's weights in torchvision's names (`features.0.weight`, ...), as .pth or .safetensors; its classifier is not
    read."""
    lpips: PathKey | None = None
    """The linear layers of LPIPS (Zhang et al. 2018; `lin0.model.1.weight`, ...); without them all channels count
    alike."""


class PerceptualLoss:
    """Mean over places of the squared distance of normalised features, summed over stages.

    Deliberately no module: the codec that is given one neither trains nor saves it.
    """

    def __init__(self, trunk: "VGG16Features", scales: list[Tensor]):
        """Take both over: they are frozen."""
        self.trunk = trunk.eval().requires_grad_(False)
        self.scales = scales

    @classmethod
    def from_files(cls, config: PerceptualConfig) -> "PerceptualLoss":
        """Read the weights.

        Raises:
            CheckpointError: When a file is missing, unreadable, or lacks a tensor.
        """
        trunk = VGG16Features()
        trunk.load_state_dict(_vgg(read_tensors(config.vgg), trunk, config.vgg))
        if config.lpips is None:
            return cls(trunk, [torch.full((1, stage[-1], 1, 1), 1 / stage[-1]) for stage in STAGES])
        stored = read_tensors(config.lpips)
        scales = []
        for index, stage in enumerate(STAGES):
            found = next(
                (
                    stored[name]
                    for name in (f"lin{index}.model.1.weight", f"lins.{index}.model.1.weight")
                    if name in stored
                ),
                None,
            )
            if found is None or found.numel() != stage[-1]:
                raise CheckpointError(
                    f"{config.lpips}: no lin{index}.model.1.weight of {stage[-1]} values; give the linear layers of "
                    "LPIPS for VGG16, or leave perceptual.lpips out"
                )
            scales.append(found.float().reshape(1, -1, 1, 1))
        return cls(trunk, scales)

    def to(self, device: torch.device) -> "PerceptualLoss":
        """Move the weights; returns itself."""
        self.trunk.to(device)
        self.scales = [scale.to(device) for scale in self.scales]
        return self

    def __call__(self, rebuilt: Images, target: Images) -> Float[Tensor, ""]:
        """Distance between images in [0, 1]; one channel is shown as grey, transparency not at all."""
        with torch.autocast(rebuilt.device.type, enabled=False):
            distances = [
                (scale * (_unit(a) - _unit(b)).square()).sum(dim=1).mean()
                for scale, a, b in zip(self.scales, self.trunk(_rgb(rebuilt)), self.trunk(_rgb(target)), strict=True)
            ]
        return torch.stack(distances).sum()


class VGG16Features(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2014)."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList()
        width = 3
        for stage in STAGES:
            for outputs in stage:
                self.convs.append(nn.Conv2d(width, outputs, 3, padding=1))
                width = outputs

    def forward(self, images: Images) -> list[Tensor]:
        """Features at the end of each stage, from RGB images in [0, 1]."""
        mean, std = (
            constant(values, images.dtype, images.device).view(1, 3, 1, 1)
            for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        x, features, convs = (images.float() - mean) / std, [], iter(self.convs)
        for index, stage in enumerate(STAGES):
            if index:
                x = F.max_pool2d(x, 2)
            for _ in stage:
                x = F.relu(next(convs)(x))
            features.append(x)
        return features


def _vgg(stored: Mapping[str, Tensor], trunk: VGG16Features, path: Path) -> dict[str, Tensor]:
    """The trunk's tensors under our names, in order of the layers in torchvision's file."""
    layers = sorted({int(name.split(".")[1]) for name in stored if name.startswith("features.")})
    if len(layers) != len(trunk.convs):
        raise CheckpointError(
            f"{path}: has {len(layers)} convolutions named features.N, VGG16 has {len(trunk.convs)}; give the weights "
            "of torchvision's vgg16"
        )
    own = trunk.state_dict()
    found = {
        f"convs.{i}.{kind}": stored[f"features.{n}.{kind}"] for i, n in enumerate(layers) for kind in ("weight", "bias")
    }
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, VGG16 {tuple(own[name].shape)}")
    return found


def _rgb(images: Images) -> Float[Tensor, "batch rgb height width"]:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def _unit(features: Tensor) -> Tensor:
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-10)
