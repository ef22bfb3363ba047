"""Which parts of a picture are encoded: the centre square, or several squares and their mirror images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokscale.data.tokenization.config import VariantConfig


@dataclass(frozen=True)
class Crop:
    """A square of the source picture, in its pixels."""

    left: int
    top: int
    side: int
    mirrored: bool

    def box(self) -> tuple[int, int, int, int]:
        """x0 y0 x1 y1 as they are stored: x0 > x1 says mirrored."""
        right = self.left + self.side
        left, right = (right, self.left) if self.mirrored else (self.left, right)
        return left, self.top, right, self.top + self.side


def crops(width: int, height: int, config: VariantConfig) -> list[Crop]:
    """The crops of a picture, unmirrored ones first, in the order in which their codes are stored."""
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    if config.crops == 1:
        plain = [Crop(left, top, square, False)]
    else:
        side = max(1, round(square / config.scale))
        room = square - side
        places = [(room // 2, room // 2), (0, 0), (room, 0), (0, room), (room, room)]
        plain = [Crop(left + x, top + y, side, False) for x, y in places]
    mirrored = [Crop(crop.left, crop.top, crop.side, True) for crop in plain] if config.flips else []
    return plain + mirrored


def boxes(chosen: list[Crop]) -> NDArray[np.float32]:
    """As a block stores them: `[4]` of a single crop, `[A, 4]` of several."""
    stacked = np.array([crop.box() for crop in chosen], np.float32)
    return stacked[0] if len(chosen) == 1 else stacked
