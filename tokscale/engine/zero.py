"""DeepSpeed ZeRO behind the same interface as the eager engine.

DeepSpeed shards, gathers and reduces; what a step means stays ours: the gradient is measured and agreed on by all
ranks here, and clipped or ignored by the optimizer that DeepSpeed calls. Nothing is measured twice or read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tokscale.base.batch import Batch, LossOutput
from tokscale.dist.comm import Comm
from tokscale.engine.access import ZeroAccess
from tokscale.engine.backend import agree_on_hpz, load_deepspeed
from tokscale.engine.common import CommonEngine
from tokscale.engine.compile import region_compiler
from tokscale.engine.config import OptimizerConfig, ZeroConfig
from tokscale.engine.construct import construct_sharded, divides_while_making, undivided_numel, whole_numel
from tokscale.engine.ds_config import deepspeed_config, hpz_ranks, working_dtype
from tokscale.engine.fragments import StateTensor, broadcast_from_main, buffer_states
from tokscale.engine.groups import parameter_groups
from tokscale.engine.optim import build_optimizer
from tokscale.engine.schedule import Schedule
from tokscale.engine.selfcheck import check_accumulating
from tokscale.engine.shards.flat import FlatLayout
from tokscale.engine.shards.layout import Layout
from tokscale.engine.shards.sliced import SlicedLayout
from tokscale.engine.shards.whole import WholeLayout
from tokscale.engine.verdict import Verdict

LAYOUTS: dict[int, Callable[[Any], Layout]] = {0: WholeLayout, 1: FlatLayout, 2: FlatLayout, 3: SlicedLayout}
"""By ZeRO stage."""


class ZeroEngine(CommonEngine):
    """ZeRO stages 0 to 3, in fp32 or bf16."""

    def __init__(
        self,
        name: str,
        make_model: Callable[[], nn.Module],
        *,
        config: ZeroConfig,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        comm: Comm,
        micro_batches: int,
        micro_batch_size: int,
    ):
        deepspeed = load_deepspeed(comm)
        access = ZeroAccess(deepspeed, config.stage)
        if config.stage >= 2:
            check_accumulating(deepspeed, config.stage, access, LAYOUTS[config.stage], comm.device)
        hpz = hpz_ranks(config, comm.world, comm.env.local_world)
        if config.stage == 3:
            agree_on_hpz(hpz)
        divided = divides_while_making(config, make_model)
        model = construct_sharded(deepspeed, make_model, config, hpz) if divided else make_model()
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
        options = deepspeed_config(
            config,
            parameters=whole_numel(model),
            micro_batches=micro_batches,
            micro_batch_size=micro_batch_size,
            world=comm.world,
            hpz=hpz,
        )
        for buffer in model.buffers():
            buffer.data = buffer.data.to(comm.device)
        broadcast_from_main(model.buffers())
        self._output: LossOutput | None = None
        self._bridge()
        self._deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(optimizer, parameter_groups(model, optimizer.lr_scales)),
            config=options,
            dist_init_required=False,
        )
        self._layout = LAYOUTS[config.stage](self._deepspeed)
        self.replicated = self._layout.replicated
        self.optimizer = self._layout.optimizer
        self.access = access
        self._finish(self._layout.masters(), config.ema)

    # DeepSpeed finds the tensors of a module's output only in tuples, lists and dicts, and without them neither
    # prepares backward nor gathers the root's own parameters for it. So the root module returns its bare loss, and
    # the rest of the output waits beside it.

    def _bridge(self) -> None:
        plain = self.model.forward
        autocast = self._config.dtype != working_dtype(self._config)

        def forward(batch: Batch) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16) if autocast else nullcontext():
                self._output = plain(batch)
            assert self._output is not None
            return self._output.total

        self.model.forward = forward

    @contextmanager
    def _unbridged(self) -> Iterator[None]:
        bridge = self.model.__dict__.pop("forward")
        try:
            yield
        finally:
            self.model.forward = bridge

    def _forward(self, batch: Batch) -> LossOutput:
        total = self._deepspeed(batch)
        output, self._output = self._output, None
        assert output is not None
        return LossOutput(total=total, parts=output.parts, weights=output.weights, metrics=output.metrics)

    def _backward(self, loss: Tensor) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(len(self._losses) == self._micro_batches)
        self._deepspeed.backward(loss)

    @property
    def _divided_to(self) -> float:
        return self._config.gradient_clipping

    def _reduce(self) -> list[Tensor]:
        return self._layout.gradients()

    def _apply(self, verdict: Verdict) -> None:
        del verdict  # the optimizer knows it
        self._deepspeed.step()
        self._layout.clear_gradients()

    @contextmanager
    def _whole(self, by_module: bool) -> Iterator[None]:
        opened = self.access.by_module if by_module else self.access.unsharded
        with self._unbridged(), opened(self._deepspeed):
            yield

    def bytes_to_gather(self) -> int:
        """Those of all parameters in stage 3."""
        if self.access.whole:
            return 0
        return sum(undivided_numel(parameter) * parameter.element_size() for parameter in self.model.parameters())

    def _fixed(self) -> list[StateTensor]:
        return [*self._layout.frozen(), *buffer_states(self.model)]

    def _publish(self) -> None:
        self._layout.refresh_model_params()
