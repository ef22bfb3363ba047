"""Stage 3: every parameter is cut into equal slices of its own, one per rank, the last one padded."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from tokscale.engine.fragments import Master, ParamSlice, StateTensor
from tokscale.engine.optimizer import ShardedOptimizer


class SlicedLayout:
    """See `Layout`."""

    replicated = False

    def __init__(self, engine: Any):
        self._model: nn.Module = engine.module
        self._zero = engine.optimizer
        self.optimizer: ShardedOptimizer = self._zero.optimizer
        self._zero.step = self._step
        if engine.device.type == "cuda":
            self._zero.reduce_and_partition_stream.synchronize = self._await_reduction

    def masters(self) -> list[Master]:
        """One flat tensor per group: this rank's slices, one after another."""
        return [
            Master(data, tuple(_slices(parameters)))
            for data, parameters in zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True)
        ]

    def frozen(self) -> list[StateTensor]:
        """This rank's slice of each."""
        tensors = []
        divided: dict[str, Any] = dict(self._model.named_parameters())
        for name, parameter in divided.items():
            start, count = _slice_of(parameter)
            if not parameter.requires_grad and count:
                data = parameter.ds_tensor.detach().view(-1)[:count]
                tensors.append(StateTensor(name, "frozen", tuple(parameter.ds_shape), start, data, replicated=False))
        return tensors

    def gradients(self) -> list[Tensor]:
        """Slices of the reduced gradient."""
        if self._zero.offload_optimizer:
            return [master.grad for master in self._zero.fp32_partitioned_groups_flat]
        return [piece for pieces in self._zero.averaged_gradients.values() for piece in pieces]

    def _await_reduction(self) -> None:
        """At the end of each backward pass: later kernels wait for the reduction, which DeepSpeed has the host do."""
        reduction = self._zero.reduce_and_partition_stream
        torch.cuda.current_stream(reduction.device).wait_stream(reduction)

    @torch.no_grad()
    def _step(self, closure: None = None) -> None:
        """DeepSpeed's own step without its norm, its overflow check, and its copies of the gradient.

        It measures every piece again whatever is asked, reads the result on the host, joins the pieces in a new tensor
        and multiplies that by one. The pieces of each group lie side by side in one buffer already.
        """
        del closure
        zero = self._zero
        zero._pre_step()
        zero._partition_all_parameters()
        zero.overflow = False
        offset = 0
        if not zero.offload_optimizer:
            zero.zero_grad(set_to_none=True)
        for index, master in enumerate(zero.fp32_partitioned_groups_flat):
            if not zero.offload_optimizer:
                master.grad = zero.grad_partitions_flat_buffer.narrow(0, offset, master.numel())
                zero.averaged_gradients[index] = None
                offset += master.numel()
            zero._optimizer_step(index)
            zero._reassign_or_swap_out_partitioned_parameters(index)
            if not zero.offload_optimizer:
                master.grad = None
        zero._post_step(set())

    def clear_gradients(self) -> None:
        """Zero the slices, which DeepSpeed keeps."""
        # DeepSpeed only overwrites the slices of parameters that were used; the others would keep the last gradient.
        self._zero.grad_partitions_flat_buffer.zero_()
        if self._zero.offload_optimizer:
            for master in self._zero.fp32_partitioned_groups_flat:
                master.grad.zero_()

    def refresh_model_params(self) -> None:
        """Copy the slices and gather the small parameters that stay whole; forget second copies of the old ones."""
        self._zero._partition_all_parameters()
        divided: list[Any] = list(self._model.parameters())
        for parameter in divided:  # of frozen ones, too, which DeepSpeed would keep
            parameter.ds_secondary_tensor = None
        for index in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if persistent := self._zero.persistent_parameters:
            persistent[0].all_gather(persistent)


def _slices(parameters: Iterable[Any]) -> Iterator[ParamSlice]:
    offset = 0
    for parameter in parameters:
        start, count = _slice_of(parameter)
        yield ParamSlice(parameter, tuple(parameter.ds_shape), start, slice(offset, offset + count))
        offset += parameter.partition_numel()


def _slice_of(parameter: Any) -> tuple[int, int]:
    """First element and number of elements of this rank's slice, padding left out."""
    size = parameter.partition_numel()
    start = min(torch_dist.get_rank() * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)
