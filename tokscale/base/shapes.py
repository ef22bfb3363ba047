"""The legend of axis names, and the annotations that carry them.

Public tensor signatures read `Float[Tensor, "batch seq dim"]`; the tests execute them (jaxtyping + beartype).

| axis | meaning |
|---|---|
| `batch` | samples of one micro batch on one rank |
| `text` | text positions, without the start token |
| `image` | image tokens in raster order, `grid_h * grid_w` (times `levels`) |
| `seq` | positions of the whole sequence: start, text, image |
| `dim` | width of the residual stream |
| `heads`, `dim_head` | attention heads and their width |
| `vocab` | entries of a vocabulary |
| `grid_h`, `grid_w` | rows and columns of the token grid |
| `levels` | residual-quantization depth |
| `channels`, `height`, `width` | images |
"""

from jaxtyping import Bool, Float, Int, Num, Shaped, UInt8
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Num", "Shaped", "Tensor", "UInt8"]
