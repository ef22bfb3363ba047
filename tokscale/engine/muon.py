"""Muon (Jordan et al. 2024, arXiv:2502.16982): momentum made orthogonal, for the `decay` group; AdamW for the rest.

Orthogonalisation reads whole matrices. Where masters are divided, each matrix is completed by one all-reduce, every
rank computes the same product and keeps its own range; only the momentum is state, and it stays divided.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from tokscale.engine.config import MuonConfig
from tokscale.engine.fragments import Master, ParamSlice
from tokscale.engine.optimizer import Slot, optimizer
from tokscale.engine.verdict import GuardedOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Jordan): steep at zero; singular values end between about 0.7 and 1.2."""
ITERATIONS = 5


@optimizer(MuonConfig)
class Muon(GuardedOptimizer):
    """Muon with Nesterov momentum, updates scaled to AdamW's size so that both groups share one learning rate.

    Parameters with more than two axes are matrices, first axis by the rest.
    """

    def __init__(self, params: list[dict[str, Any]], config: MuonConfig):
        defaults = {"lr": config.lr, "momentum": config.momentum, "betas": config.betas, "eps": config.eps}
        super().__init__(params, defaults | {"weight_decay": 0.0})
        self.config = config

    @classmethod
    def slots(cls, config: MuonConfig, shape: tuple[int, ...], group: str) -> tuple[Slot, ...]:
        """The momentum of a matrix, and AdamW's two means for the rest."""
        del config, shape
        return (Slot("momentum_buffer"),) if group == "decay" else (Slot("exp_avg"), Slot("exp_avg_sq"))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update to every master that has a gradient. Collective where masters are divided."""
        del closure
        for group in self.param_groups:
            for data in group["params"]:
                if data.grad is not None:
                    master = self.masters[data]
                    number = self.next_step(self.state[data])
                    gradient = self.gradient(data).view(-1)
                    if self._is_matrix(master):
                        update = self._muon(master, gradient, group)
                    else:
                        update = self._adam(master, gradient, group, number)
                    weight = data.view(-1)
                    decayed = weight.mul(1 - group["lr"] * group["weight_decay"])
                    self.keep(weight, decayed.sub_(update, alpha=group["lr"]))

    def _muon(self, master: Master, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        kept = self.state[master.data]["momentum_buffer"].view(-1)
        momentum = kept.lerp(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])
        self.keep(kept, momentum)
        for piece in master.slices:
            whole = self._complete(piece, update[piece.place])
            whole = orthogonal(whole) * (0.2 * max(whole.shape) ** 0.5)
            part = whole.reshape(-1)[piece.start : piece.start + piece.count]
            update[piece.place] = part.to(update)
        return update

    def _adam(self, master: Master, gradient: Tensor, group: dict[str, Any], number: Tensor) -> Tensor:
        (beta1, beta2), state = group["betas"], self.state[master.data]
        mean = state["exp_avg"].view(-1).lerp(gradient, 1 - beta1)
        square = state["exp_avg_sq"].view(-1).lerp(gradient.square(), 1 - beta2)
        self.keep(state["exp_avg"].view(-1), mean)
        self.keep(state["exp_avg_sq"].view(-1), square)
        root = (square / (1 - beta2**number)).sqrt_().add_(group["eps"])
        return mean / (1 - beta1**number) / root

    def _complete(self, piece: ParamSlice, part: Tensor) -> Tensor:
        """The whole matrix of which this rank holds `part`."""
        rows, size = piece.shape[0], torch.Size(piece.shape).numel()
        if self.comm is None:
            return part.view(rows, -1)
        whole = torch.zeros(size, dtype=part.dtype, device=self.comm.device)
        whole[piece.start : piece.start + piece.count] = part
        torch_dist.all_reduce(whole)
        return whole.view(rows, -1)

    def _is_matrix(self, master: Master) -> bool:
        return self.groups[master.slices[0].parameter] == "decay"


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near one, by Newton-Schulz; bf16 on CUDA, where it is accurate enough."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
