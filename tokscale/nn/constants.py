"""Small tensors of numbers that a configuration holds."""

from functools import lru_cache

import torch

from tokscale.base.shapes import Shaped, Tensor


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device | str) -> Shaped[Tensor, "values"]:
    """`values` on a device, copied there once: a copy in every step would hold a GPU up. Not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
