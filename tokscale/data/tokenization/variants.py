"""Which parts of an image are encoded: the largest of its shape at the centre, or several and their mirror images."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tokscale.data.tokenization.config import VariantConfig


@dataclass(frozen=True)
class Crop:
    """A rectangle of the source image, in its pixels."""

    left: int
    top: int
    width: int
    height: int
    mirrored: bool

    def box(self) -> tuple[int, int, int, int]:
        """x0 y0 x1 y1 as they are stored: x0 > x1 says mirrored."""
        right = self.left + self.width
        left, right = (right, self.left) if self.mirrored else (self.left, right)
        return left, self.top, right, self.top + self.height


def crops(width: int, height: int, config: VariantConfig, shape: tuple[int, int] = (1, 1)) -> list[Crop]:
    """The crops of an image, unmirrored ones first, in the order in which their codes are stored.

    Args:
        width: Of the image.
        height: Likewise.
        config: Which crops.
        shape: Rows to columns of a crop; a square by default.
    """
    rows, columns = shape
    if width * rows > height * columns:  # wider than the crop
        across, down = max(1, round(height * columns / rows)), height
    else:
        across, down = width, max(1, round(width * rows / columns))
    left, top = (width - across) // 2, (height - down) // 2
    if config.crops == 1:
        plain = [Crop(left, top, across, down, False)]
    else:
        part_across, part_down = (max(1, round(side / config.scale)) for side in (across, down))
        x, y = across - part_across, down - part_down
        places = [(x // 2, y // 2), (0, 0), (x, 0), (0, y), (x, y)]
        plain = [Crop(left + right, top + below, part_across, part_down, False) for right, below in places]
    mirrored = [replace(crop, mirrored=True) for crop in plain] if config.flips else []
    return plain + mirrored


def boxes(chosen: list[Crop]) -> NDArray[np.float32]:
    """As a block stores them: `[4]` of a single crop, `[A, 4]` of several."""
    stacked = np.array([crop.box() for crop in chosen], np.float32)
    return stacked[0] if len(chosen) == 1 else stacked
