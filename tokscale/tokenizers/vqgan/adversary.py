"""How a generator meets a discriminator that lives elsewhere, in an engine of its own.

All that the generator needs of it is a number and its gradient by the images: the chain rule does the rest. So
neither network's parameters are ever touched by the other's engine, however they are divided.
"""

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.grad import conv2d_weight

from tokscale.base.shapes import Float, Tensor

Images = Float[Tensor, "batch channels height width"]


class Adversary(Protocol):
    """Looks at reconstructions."""

    def __call__(self, rebuilt: Images, real: Images) -> tuple[Float[Tensor, ""], Images]:
        """The generator's adversarial loss of images in [-1, 1], and its gradient by them."""
        ...


def with_gradient(images: Images, value: Float[Tensor, ""], gradient: Images) -> Float[Tensor, ""]:
    """`value`, with this gradient by `images`."""
    carrier = (images * gradient).sum()
    return value + carrier - carrier.detach()


@torch.no_grad()
def last_layer_gradient(
    layer: nn.Conv2d | nn.ConvTranspose2d,
    hidden: Float[Tensor, "batch inputs rows cols"],
    gradient: Float[Tensor, "batch outputs height width"],
) -> Float[Tensor, "a b kernel kernel"]:
    """Gradient by the layer's weight, from its input and the gradient by its output.

    The layer is linear in its weight, whose value is not needed, so it may be divided over ranks.
    """
    kernel = (layer.kernel_size[0], layer.kernel_size[1])
    options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding}
    if isinstance(layer, nn.ConvTranspose2d):  # a convolution from its output to its input
        size = (layer.in_channels, layer.out_channels, *kernel)
        return conv2d_weight(gradient, size, hidden, **options)
    size = (layer.out_channels, layer.in_channels, *kernel)
    return conv2d_weight(hidden, size, gradient, **options)
