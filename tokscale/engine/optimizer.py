"""What an optimizer has to say to be saved, loaded and resharded, and the registry of those that do.

An optimizer is one class, added with `@optimizer(ItsConfig)`. It declares the tensors that it keeps for a parameter;
the base class makes them, wherever the parameter's masters lie, and engines save and load what is declared.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tokscale.base.config import Config
from tokscale.base.registry import Registry
from tokscale.dist.comm import Comm
from tokscale.engine.fragments import Master, ParamSlice, StateTensor
from tokscale.engine.groups import base_of


class AnyOptimizerConfig(Config):
    """Base of the configurations of optimizers; a subclass adds its `kind` and its own options."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: float = Field(default=0.045, ge=0)
    """Decoupled decay of the `decay` group: matrices and kernels, never norms, biases or embeddings. DALL-E: 4.5e-2."""
    lr_scales: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Factors of the learning rate by patterns of parameter names, for fine-tuning: `{"*emb*": 10, "stack.*": 0.1}`. Of
    several that match, the last counts; what shall not move at all is named in `freeze`."""


@dataclass(frozen=True)
class Slot:
    """One tensor that an optimizer keeps for a parameter."""

    name: str
    """Also its name in checkpoints."""
    shape: tuple[int, ...] | None = None
    """None: like the parameter, and under ZeRO cut into shards with it. Else a shape of its own, such as `()` for a
    number or one side of a matrix; it lies whole on every rank, and the optimizer keeps it equal there."""
    dtype: torch.dtype = torch.float32

    def numel(self, shape: tuple[int, ...]) -> int:
        """Elements, for a parameter of that shape."""
        return torch.Size(shape if self.shape is None else self.shape).numel()


class ShardedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer over masters: whole parameters in eager, flat shards of several under ZeRO.

    Each entry of `param_groups` carries its `name`: `decay` or `no_decay`. Besides the declared slots, `state` holds
    under each master a counter `step`, which is restored from the engine's number of updates. A subclass sets
    `self.config` to what it was made with.
    """

    config_class: ClassVar[type[AnyOptimizerConfig]]
    """What it is asked for with; set by `@optimizer`."""
    config: Any
    counts_on_device: ClassVar[bool] = False
    """Whether the counter `step` must lie where the master lies (for PyTorch's fused kernels)."""

    def __init__(self, params: list[dict[str, Any]], defaults: dict[str, Any]):
        super().__init__(params, defaults)
        self.groups: dict[nn.Parameter, str] = {
            parameter: base_of(group.get("name", "")) for group in self.param_groups for parameter in group["params"]
        }
        """The group of each parameter that was given."""
        self.masters: dict[Tensor, Master] = {}
        self.comm: Comm | None = None
        """The job where masters hold parts of parameters; None where they are whole."""
        self._kept: dict[tuple[nn.Parameter, str], Tensor] = {}

    @classmethod
    @abstractmethod
    def slots(cls, config: Any, shape: tuple[int, ...], group: str) -> tuple[Slot, ...]:
        """What is kept for a parameter of that shape in that group, beside the counter of updates."""

    def start(self, masters: list[Master], comm: Comm | None) -> None:
        """Make the state, as the first step would, so that it can be saved and loaded.

        Args:
            masters: The tensors it moves; under ZeRO they are not its `param_groups`' parameters at all times.
            comm: The job, where masters hold parts of parameters.
        """
        self.comm = comm if comm is not None and comm.world > 1 else None
        for master in masters:
            self.masters[master.data] = master
            device = master.data.device if self.counts_on_device else "cpu"
            self.state[master.data] = {"step": torch.zeros((), dtype=torch.float32, device=device)}
            declared = [self.slots_of(piece) for piece in master.slices]
            common = set(declared[0]).intersection(*declared[1:]) if declared else set()
            for slot in sorted(common, key=lambda slot: slot.name):
                if slot.shape is None:  # one tensor over the whole master, as elementwise optimizers want it
                    self.state[master.data][slot.name] = torch.zeros_like(master.data, dtype=slot.dtype)
            for piece, slots in zip(master.slices, declared, strict=True):
                for slot in slots:
                    self._kept[piece.parameter, slot.name] = self._make(master, piece, slot)

    def _make(self, master: Master, piece: ParamSlice, slot: Slot) -> Tensor:
        if slot.shape is None:
            if slot.name in self.state[master.data]:
                return self.state[master.data][slot.name].view(-1)[piece.place]
            return torch.zeros(piece.count, dtype=slot.dtype, device=master.data.device)
        return torch.zeros(slot.shape, dtype=slot.dtype, device=master.data.device)

    def slots_of(self, piece: ParamSlice) -> tuple[Slot, ...]:
        """What is kept for a parameter."""
        return self.slots(self.config, piece.shape, self.groups[piece.parameter])

    def kept(self, piece: ParamSlice, name: str) -> Tensor:
        """A slot of a parameter: this rank's part of it, flat, or the whole of one that has a shape of its own."""
        return self._kept[piece.parameter, name]

    def parts(self, piece: ParamSlice) -> dict[str, Tensor]:
        """The slots that are shaped like the parameter: flat views of this rank's part, by name."""
        return {slot.name: self.kept(piece, slot.name) for slot in self.slots_of(piece) if slot.shape is None}

    def replicated(self, names: Mapping[nn.Parameter, str]) -> list[StateTensor]:
        """The slots that lie whole on every rank.

        Args:
            names: Of the model's parameters.
        """
        return [
            StateTensor(names[piece.parameter], slot.name, slot.shape, 0, self.kept(piece, slot.name).view(-1), True)
            for master in self.masters.values()
            for piece in master.slices
            for slot in self.slots_of(piece)
            if slot.shape is not None
        ]

    def check_declared(self) -> None:
        """Refuse to be saved with state that would be lost.

        Raises:
            TypeError: When a step left tensors in `state` that are not declared, or replaced declared ones.
        """
        for data, state in self.state.items():
            slices = self.masters[data].slices if data in self.masters else ()
            for name, value in state.items():
                if name == "step" or not isinstance(value, Tensor):
                    continue
                kept = [self._kept.get((piece.parameter, name)) for piece in slices]
                if not kept or any(part is None or _memory(part) != _memory(value) for part in kept):
                    raise TypeError(
                        f"{type(self).__name__} keeps {name!r} in its state, which `slots` does not declare, or which "
                        "a step replaced instead of writing in place: a checkpoint would lose it"
                    )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_Kind = TypeVar("_Kind", bound=ShardedOptimizer)
OPTIMIZERS: Registry[type[ShardedOptimizer]] = Registry("optim.kind")
"""By the `kind` of their configuration."""


def optimizer(config: type[AnyOptimizerConfig]) -> Callable[[type[_Kind]], type[_Kind]]:
    """Class decorator: add the optimizer that `config` asks for, under the config's `kind`.

    Raises:
        TypeError: When it does not declare its state, or the kind is taken.
    """

    def add(kind: type[_Kind]) -> type[_Kind]:
        if inspect.isabstract(kind):
            raise TypeError(f"optimizer {kind.__name__} lacks {', '.join(sorted(kind.__abstractmethods__))}")
        kind.config_class = config
        OPTIMIZERS.add(config.model_fields["kind"].default, kind)
        return kind

    return add


def config_of(kind: type[ShardedOptimizer]) -> type[AnyOptimizerConfig]:
    """What an optimizer is asked for with."""
    return kind.config_class


def optimizer_of(config: AnyOptimizerConfig) -> type[ShardedOptimizer]:
    """The optimizer that a configuration asks for."""
    return next(kind for kind in OPTIMIZERS.values() if kind.config_class is type(config))
