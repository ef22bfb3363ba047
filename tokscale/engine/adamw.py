"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), PyTorch's."""

from typing import Any

import torch

from tokscale.engine.config import AdamWConfig
from tokscale.engine.optimizer import ShardedOptimizer, Slot, optimizer


@optimizer(AdamWConfig)
class AdamW(torch.optim.AdamW, ShardedOptimizer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """One pass over memory instead of a dozen, on the CPU as well as on CUDA."""

    counts_on_device = True

    def __init__(self, params: list[dict[str, Any]], config: AdamWConfig):
        super().__init__(params, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.config = config

    @classmethod
    def slots(cls, config: AdamWConfig, shape: tuple[int, ...], group: str) -> tuple[Slot, ...]:
        """Running means of the gradient and of its square."""
        del config, shape, group
        return Slot("exp_avg"), Slot("exp_avg_sq")
