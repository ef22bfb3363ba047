"""Muon (Jordan et al. 2024, arXiv:2502.16982): momentum made orthogonal, for the `decay` group; AdamW for the rest.

Orthogonalisation reads whole matrices. Where masters are divided, the matrices are dealt out: one exchange brings the
parts of each to one rank, which makes it orthogonal, and another brings them back. So each matrix is computed once, a
rank computes and holds its share of them, and what travels is twice the update. Only the momentum is state, and it
stays divided.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokscale.engine.config import MuonConfig
from tokscale.engine.deal import Deal
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
        self._deals: dict[tuple[int, ...], Deal] = {}

    @classmethod
    def slots(cls, config: MuonConfig, shape: tuple[int, ...], group: str) -> tuple[Slot, ...]:
        """The momentum of a matrix, and AdamW's two means for the rest."""
        del config, shape
        return (Slot("momentum_buffer"),) if group == "decay" else (Slot("exp_avg"), Slot("exp_avg_sq"))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update to every master that has a gradient. Collective where masters are divided."""
        del closure
        updates: list[tuple[dict[str, Any], Master, Tensor]] = []
        parts: list[tuple[ParamSlice, Tensor]] = []
        for group in self.param_groups:
            for data in group["params"]:
                if data.grad is not None:
                    master = self.masters[data]
                    number = self.next_step(self.state[data])
                    gradient = self.gradient(data).view(-1)
                    if self._is_matrix(master):
                        update = self._momentum(master, gradient, group)
                        parts += [(piece, update[piece.place]) for piece in master.slices]
                    else:
                        update = self._adam(master, gradient, group, number)
                    updates.append((group, master, update))
        self._orthogonalise(parts)
        for group, master, update in updates:
            weight = master.data.view(-1)
            decayed = weight.mul(1 - group["lr"] * group["weight_decay"])
            self.keep(weight, decayed.sub_(update, alpha=group["lr"]))

    def _momentum(self, master: Master, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        kept = self.state[master.data]["momentum_buffer"].view(-1)
        momentum = kept.lerp(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])
        self.keep(kept, momentum)
        return update

    def _orthogonalise(self, parts: list[tuple[ParamSlice, Tensor]]) -> None:
        """Replace each part by that of the orthogonal matrix, in place."""
        if self.comm is None:
            for piece, part in parts:
                part.copy_(_scaled(part, piece.shape))
        elif parts:
            pieces = tuple(piece for piece, _ in parts)
            key = tuple(id(piece.parameter) for piece in pieces)
            if key not in self._deals:
                self._deals[key] = Deal(pieces, self.comm)
            self._deals[key].apply([part for _, part in parts], _scaled)

    def _adam(self, master: Master, gradient: Tensor, group: dict[str, Any], number: Tensor) -> Tensor:
        (beta1, beta2), state = group["betas"], self.state[master.data]
        mean = state["exp_avg"].view(-1).lerp(gradient, 1 - beta1)
        square = state["exp_avg_sq"].view(-1).lerp(gradient.square(), 1 - beta2)
        self.keep(state["exp_avg"].view(-1), mean)
        self.keep(state["exp_avg_sq"].view(-1), square)
        root = (square / (1 - beta2**number)).sqrt_().add_(group["eps"])
        return mean / (1 - beta1**number) / root

    def _is_matrix(self, master: Master) -> bool:
        return self.groups[master.slices[0].parameter] == "decay"


def _scaled(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The orthogonal matrix of a flat one, as large as an update of AdamW; flat."""
    matrix = flat.view(shape[0], -1)
    return (orthogonal(matrix) * (0.2 * max(matrix.shape) ** 0.5)).reshape(-1).to(flat)


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
