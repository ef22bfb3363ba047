"""The tensors of an export on their way out: what each becomes, and its values in pieces."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from tokscale.base.config import did_you_mean
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.state import ShardSource
from tokscale.checkpoint.tensorfile import CHUNK_BYTES, Entry, host_chunks
from tokscale.checkpoint.weights import check_fit, model_tensors, tied_names

Precision = Literal["fp32", "bf16", "fp16", "stored"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ExportTensor:
    """One tensor to export: as what, and where its values come from."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def entry(self) -> Entry:
        """As the file writer wants it."""
        return Entry(self.name, self.dtype, self.shape, self._cast)

    def _cast(self) -> Iterable[Tensor]:
        for chunk in self.chunks():
            yield chunk.to(self.dtype)


def from_source(source: ShardSource, meta_model: nn.Module, weights: str, precision: Precision) -> list[ExportTensor]:
    """A checkpoint's tensors, as the model on the meta device wants them.

    Raises:
        CheckpointError: When names or shapes do not fit the model.
        ConfigError: When `weights` was not saved.
    """
    slots = {name: weights_slot(source, name, weights) for name in source.names()}
    own = model_tensors(meta_model)
    check_fit(
        {name: tuple(tensor.shape) for name, tensor in own.items()},
        {name: tuple(source.shape(name, slot)) for name, slot in slots.items()},
        where="the checkpoint",
        tied={},
    )
    tensors = []
    for name, tensor in own.items():
        stored = source.read(name, slots[name], 0, 0).dtype  # reads nothing
        chunks = partial(_ranges, source, name, slots[name], tensor.numel())
        tensors.append(ExportTensor(name, tuple(tensor.shape), _target(tensor, stored, precision), chunks))
    return tensors


def from_state_dict(state: Mapping[str, Tensor], meta_model: nn.Module, precision: Precision) -> list[ExportTensor]:
    """A state dict's tensors, as the model on the meta device wants them.

    Raises:
        CheckpointError: When names or shapes do not fit the model, or tied weights differ.
    """
    own, tied = model_tensors(meta_model), tied_names(meta_model)
    check_fit(
        {name: tuple(tensor.shape) for name, tensor in own.items()},
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        where="the state dict",
        tied=tied,
    )
    for alias, name in tied.items():
        if alias in state and not torch.equal(state[alias], state[name]):
            raise CheckpointError(f"{alias} and {name} are one tied tensor in the model, but differ in the state dict")
    return [
        ExportTensor(
            name,
            tuple(tensor.shape),
            _target(tensor, state[name].dtype, precision),
            partial(host_chunks, state[name].detach().reshape(-1)),
        )
        for name, tensor in own.items()
    ]


def weights_slot(source: ShardSource, name: str, weights: str) -> str:
    """Which of a tensor's slots holds the `weights` asked for: `raw`, `ema/<decay>`, or `ema` for the only average.

    Raises:
        ConfigError: When they were not saved.
    """
    stored = source.slots(name)
    if "weight" not in stored:  # a buffer or a frozen parameter has no averages
        return stored[0]
    averages = [slot for slot in stored if slot.startswith("ema/")]
    if weights == "ema" and len(averages) == 1:
        return averages[0]
    wanted = "weight" if weights == "raw" else weights
    if wanted not in ["weight", *averages]:
        raise ConfigError(f"weights: got {weights!r}, which was not saved{did_you_mean(weights, ['raw', *averages])}")
    return wanted


def _target(own: Tensor, stored: torch.dtype, precision: Precision) -> torch.dtype:
    # Buffers keep their dtype: statistics, codebooks and angles do not survive rounding as weights do.
    if precision == "stored" or not isinstance(own, nn.Parameter) or not stored.is_floating_point:
        return stored
    return _DTYPES[precision]


def _ranges(source: ShardSource, name: str, slot: str, numel: int) -> Iterable[Tensor]:
    size = CHUNK_BYTES // 4
    for start in range(0, numel, size):
        yield source.read(name, slot, start, min(start + size, numel))
