"""Plain PyTorch: the engine that is easy to believe, and that the others are held against."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from tokscale.base.batch import Batch, LossOutput
from tokscale.dist.comm import Comm
from tokscale.engine.common import CommonEngine
from tokscale.engine.compile import region_compiler
from tokscale.engine.config import COMPUTES_BF16, EagerConfig, OptimizerConfig
from tokscale.engine.fragments import StateTensor, broadcast_from_main, buffer_states, frozen_states, whole_master
from tokscale.engine.groups import parameter_groups
from tokscale.engine.optim import build_optimizer
from tokscale.engine.schedule import Schedule
from tokscale.engine.verdict import Verdict

REDUCE_ELEMENTS = 8_000_000
"""Gradients are averaged over ranks in messages of at least so many elements."""


class EagerEngine(CommonEngine):
    """Whole parameters on every rank, gradients averaged after the last micro batch; bf16 by autocast."""

    replicated = True

    def __init__(
        self,
        name: str,
        make_model: Callable[[], nn.Module],
        *,
        config: EagerConfig,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        comm: Comm,
        micro_batches: int,
    ):
        model = make_model().to(comm.device)
        super().__init__(
            name,
            model,
            comm=comm,
            schedule=schedule,
            lr=optimizer.lr,
            micro_batches=micro_batches,
            regions=region_compiler(config.compile, comm.device),
        )
        self._config = config
        self.dtype = config.dtype
        groups = parameter_groups(model, optimizer.lr_scales)
        self._trained = {key: value for group in groups for key, value in group.parameters.items()}
        if comm.world > 1:
            broadcast_from_main((*model.parameters(), *model.buffers()))
        self.optimizer = build_optimizer(optimizer, groups)
        self._finish([whole_master(parameter) for parameter in self._trained.values()], config.ema)

    def _forward(self, batch: Batch) -> LossOutput:
        bf16 = COMPUTES_BF16[self._config.dtype]
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            return self.model(batch)

    def _backward(self, loss: Tensor) -> None:
        (loss / self._micro_batches).backward()

    @property
    def _divided_to(self) -> float:
        return 0.0

    def _reduce(self) -> list[Tensor]:
        for parameter in self._trained.values():
            if parameter.grad is None:  # not used in this step; a rank that did use it waits for us
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        if self._comm.world > 1:
            average_over_ranks(gradients, self._comm.world)
        return gradients

    def _apply(self, verdict: Verdict) -> None:
        if limit := self._config.gradient_clipping:  # torch's own way, in a pass of its own: the oracle
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), limit, verdict.norm.float())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _whole(self, by_module: bool) -> AbstractContextManager[None]:
        del by_module
        return nullcontext()

    def _fixed(self) -> list[StateTensor]:
        return [*frozen_states(self.model), *buffer_states(self.model)]

    def _publish(self) -> None:
        pass  # the masters are the parameters


def average_over_ranks(gradients: list[Tensor], world: int) -> None:
    """Replace each gradient by its mean over ranks, a bucket at a time, in a fixed order."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(piece.numel() for piece in bucket) >= REDUCE_ELEMENTS:
            _average(bucket, world)
            bucket = []
    if bucket:
        _average(bucket, world)


def _average(bucket: list[Tensor], world: int) -> None:
    packed = torch.cat([gradient.flatten() for gradient in bucket])
    torch_dist.all_reduce(packed)
    packed /= world
    for gradient, part in zip(bucket, packed.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))
