"""Stages 1 and 2: each group's parameters lie one after another in a flat buffer, which is cut evenly over the ranks.

A parameter may be cut anywhere, lie on several ranks, or not lie on this one.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as torch_dist
from torch import Tensor, nn

from tokscale.engine.fragments import Master, ParamSlice, StateTensor, frozen_states
from tokscale.engine.optimizer import ShardedOptimizer


class FlatLayout:
    """See `Layout`."""

    replicated = False

    def __init__(self, engine: Any):
        self._model: nn.Module = engine.module
        self._zero = engine.optimizer
        self.optimizer: ShardedOptimizer = self._zero.optimizer
        self._zero.check_grad_overflow = False  # a look at every gradient, and a wait; the optimizer is told instead

    def masters(self) -> list[Master]:
        """One cut per group, with the overlap of each of the group's parameters."""
        return [
            Master(data, tuple(self._slices(index, data.numel())))
            for index, data in enumerate(self._zero.single_partition_of_fp32_groups)
        ]

    def _slices(self, index: int, size: int) -> Iterator[ParamSlice]:
        first = torch_dist.get_rank() * size
        parameters, offsets = self._zero.round_robin_bit16_groups[index], self._zero.round_robin_bit16_offsets[index]
        for parameter, offset in zip(parameters, offsets, strict=True):
            low = max(offset, first)
            high = max(min(offset + parameter.numel(), first + size), low)
            start = min(low - offset, parameter.numel())
            yield ParamSlice(parameter, tuple(parameter.shape), start, slice(low - first, high - first))

    def frozen(self) -> list[StateTensor]:
        """Whole on every rank."""
        return frozen_states(self._model)

    def gradients(self) -> list[Tensor]:
        """Pieces of the reduced gradient that fall into this rank's cut."""
        if self._zero.cpu_offload:
            self._zero._wait_for_offload_copies()
            return [master.grad for master in self._zero.single_partition_of_fp32_groups]
        return [piece for pieces in self._zero.averaged_gradients.values() for piece in pieces]

    def clear_gradients(self) -> None:
        """Only what offloading keeps."""
        if self._zero.cpu_offload:  # kept between steps, and not overwritten for a parameter that is not used
            for master in self._zero.single_partition_of_fp32_groups:
                master.grad.zero_()

    def refresh_model_params(self) -> None:
        """Copy the cut into the flat buffer and gather the others' cuts."""
        self._zero.update_lp_params()
