"""The patch discriminator: is this image, place by place, a real one?"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokscale.base.batch import Batch, LossOutput
from tokscale.base.config import Config, LayerCount
from tokscale.base.kinds import for_each
from tokscale.base.shapes import Float, Tensor
from tokscale.tokenizers.pretrained.cnn import normalization

Images = Float[Tensor, "batch channels height width"]
Logits = Float[Tensor, "batch 1 rows cols"]
Weight = Annotated[float, Field(ge=0)]
_SLOPE = 0.2
AdversarialLoss = Literal["hinge", "bce"]


class AdversarialConfig(Config):
    """The discriminator and how it enters the generator's loss."""

    dim: PositiveInt = 64
    """Channels after the first layer; doubled at each layer, up to eight times."""
    layers: LayerCount = 3
    """Halvings of the resolution (pix2pix and taming: 3, the originals: 4)."""
    loss: AdversarialLoss = "hinge"
    """Hinge, or binary cross-entropy (the originals' `use_hinge_loss=False`)."""
    weight: Weight = 1.0
    """Of the adversarial loss in the generator's. taming: 0.75 to 0.8; LlamaGen: 0.5; ViT-VQGAN and Muse: 0.1."""
    adaptive: bool = True
    """Multiply the weight by the norm of the other losses' gradient over that of the adversarial loss, both at the
    decoder's last layer (Esser et al. 2021, equation 7)."""
    adaptive_max: float = Field(default=1e4, gt=0)
    """Upper bound of that ratio."""
    start_step: NonNegativeInt = 0
    """Optimizer steps before the discriminator begins to learn and to count. LlamaGen: 20,000."""
    gradient_penalty_weight: Weight = 0.0
    """Of the squared distance from 1 of the norm of its gradient at real images (the originals: 10)."""
    gradient_penalty_every: PositiveInt = 4
    """Optimizer steps between penalties; the steps between have none, and are not scaled up for it."""


@dataclass(frozen=True)
class ImagePairBatch(Batch):
    """Images and their reconstructions, in [-1, 1]."""

    real: Images
    rebuilt: Images


class Discriminator(nn.Module):
    """Convolutions to one logit a patch (Isola et al. 2017), with group norms: nothing is shared between samples.

    Its gradient penalty is differentiated twice, which an engine that divides parameters cannot follow; the stage
    builds it on one that keeps them whole.
    """

    def __init__(self, config: AdversarialConfig, channels: int, image_size: int):
        super().__init__()
        self.config, self.shape = config, (channels, image_size, image_size)
        self.penalized = False
        widths = [config.dim * min(1 << layer, 8) for layer in range(config.layers + 1)]
        self.conv_in = nn.Conv2d(channels, widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for layer in range(config.layers):
            stride = 2 if layer < config.layers - 1 else 1
            self.convs.append(nn.Conv2d(widths[layer], widths[layer + 1], 3, stride=stride, padding=1))
            self.norms.append(normalization(widths[layer + 1]))
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, batch: ImagePairBatch) -> LossOutput:
        """Loss of telling images from reconstructions, and in steps that are due the gradient penalty."""
        real = batch.real.detach().requires_grad_(self.penalized)
        judged, rebuilt = self.score(real), self.score(batch.rebuilt.detach())
        parts, weights = {"discriminator": self.loss(judged, rebuilt)}, {"discriminator": 1.0}
        if self.penalized:
            parts["gradient_penalty"] = gradient_penalty(real, judged)
            weights["gradient_penalty"] = self.config.gradient_penalty_weight
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        metrics = {"logits_real": judged.detach().mean(), "logits_rebuilt": rebuilt.detach().mean()}
        return LossOutput(total=total, parts=parts, weights=weights, metrics=metrics)

    def score(self, images: Images) -> Logits:
        """fp32 logits of being real, from images in [-1, 1]."""
        x = F.leaky_relu(self.conv_in(images.to(self.conv_in.weight.dtype)), _SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), _SLOPE)
        return self.conv_out(x).float()

    def loss(self, real: Logits, rebuilt: Logits) -> Float[Tensor, ""]:
        """What the discriminator minimises."""
        return DISCRIMINATOR_LOSSES[self.config.loss](real, rebuilt)

    def generator_loss(self, rebuilt: Logits) -> Float[Tensor, ""]:
        """What the generator minimises."""
        return GENERATOR_LOSSES[self.config.loss](rebuilt)

    def anneal(self, step: int) -> None:
        """Whether optimizer step `step` has a gradient penalty."""
        config = self.config
        self.penalized = config.gradient_penalty_weight > 0 and step % config.gradient_penalty_every == 0

    def train_flops(self) -> float:
        """Of looking at an image and its reconstruction, forward and backward, without the penalty."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
            Discriminator(self.config, self.shape[0], self.shape[1]).score(torch.empty(1, *self.shape))
        return 6.0 * counted.get_total_flops()


DISCRIMINATOR_LOSSES = for_each(
    AdversarialLoss,
    {
        "hinge": lambda real, rebuilt: (F.relu(1 - real).mean() + F.relu(1 + rebuilt).mean()) / 2,
        "bce": lambda real, rebuilt: (F.softplus(-real).mean() + F.softplus(rebuilt).mean()) / 2,
    },
)
"""Of the logits of images and of reconstructions."""
GENERATOR_LOSSES = for_each(
    AdversarialLoss, {"hinge": lambda rebuilt: -rebuilt.mean(), "bce": lambda rebuilt: F.softplus(-rebuilt).mean()}
)
"""Of the logits of reconstructions."""


def gradient_penalty(images: Images, logits: Logits) -> Float[Tensor, ""]:
    """Mean squared distance from 1 of the norm of the logits' gradient by each image."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()
