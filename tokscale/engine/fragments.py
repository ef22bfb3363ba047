"""What every engine's state looks like from outside: named contiguous ranges on this rank."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from tokscale.engine.groups import persistent_buffers


@dataclass(frozen=True)
class ParamSlice:
    """One parameter within a master tensor that an optimizer moves.

    Eager masters are whole parameters, with one piece each. Under ZeRO a master is this rank's part of a whole group,
    and slices that lie entirely on other ranks are listed too, with an empty range.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the parameter that lies in this master."""
    place: slice
    """Where in the flattened master those elements are."""

    @property
    def count(self) -> int:
        """Number of the parameter's elements in this master."""
        return self.place.stop - self.place.start


@dataclass(frozen=True)
class Master:
    """A tensor that an optimizer moves, and what lies in it."""

    data: Tensor
    slices: tuple[ParamSlice, ...]
    """The same parameters in the same order on every rank."""


@dataclass(frozen=True)
class Fragment:
    """The part of one trainable parameter whose optimizer state lives on this rank.

    `weight` and each of `moments` are flat views of the training state, covering elements
    `[start, start + weight.numel())` of the parameter; writing to them changes the training state.
    """

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    weight: Tensor
    """fp32 master weight."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """By the optimizer's own name of the state."""


@dataclass(frozen=True)
class StateTensor:
    """One persistent flat range on this rank, to be saved from and loaded into."""

    name: str
    slot: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    data: Tensor
    """Flat view of the live state."""
    replicated: bool
    """True when every rank holds this same range, which then is the whole tensor."""

    def share(self, rank: int, world: int) -> tuple[int, int]:
        """The range within `data` that `rank` saves, and reads first on loading."""
        if not self.replicated:
            return 0, self.data.numel()
        size = -(-self.data.numel() // world)
        return min(rank * size, self.data.numel()), min((rank + 1) * size, self.data.numel())


def parts_of(masters: Iterable[Master], pieces: Iterable[Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Cut tensors that lie one after another as the masters do, such as pieces of a gradient, by parameter."""
    first, places = 0, list[tuple[int, int, nn.Parameter]]()
    for master in masters:
        places += [(first + s.place.start, first + s.place.stop, s.parameter) for s in master.slices if s.count]
        first += master.data.numel()
    places.sort(key=lambda place: place[0])
    begin, at = 0, 0
    for piece in pieces:
        values, end = piece.reshape(-1), begin + piece.numel()
        while at < len(places) and places[at][0] < end:
            start, stop, parameter = places[at]
            if stop > begin:
                yield parameter, values[max(start, begin) - begin : min(stop, end) - begin]
            if stop > end:
                break
            at += 1
        begin = end


def whole_master(parameter: nn.Parameter) -> Master:
    """A parameter that an optimizer moves as it is."""
    flat(parameter)
    return Master(parameter, (ParamSlice(parameter, tuple(parameter.shape), 0, slice(0, parameter.numel())),))


def buffer_states(model: nn.Module) -> list[StateTensor]:
    """The persistent buffers of a model, whole on every rank."""
    return [
        StateTensor(name, "buffer", tuple(buffer.shape), 0, flat(buffer), replicated=True)
        for name, buffer in persistent_buffers(model).items()
    ]


def frozen_states(model: nn.Module) -> list[StateTensor]:
    """The parameters that do not train, where every rank holds them whole."""
    return [
        StateTensor(name, "frozen", tuple(parameter.shape), 0, flat(parameter), replicated=True)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values. Collective."""
    for tensor in tensors:
        if tensor.numel():  # as bytes, since not every backend knows every dtype
            torch_dist.broadcast(flat(tensor).view(torch.uint8), src=0)


def flat(tensor: Tensor) -> Tensor:
    """A one-dimensional view of a tensor, which is made contiguous in place first."""
    if not tensor.is_contiguous():
        tensor.data = tensor.data.contiguous()
    return tensor.detach().view(-1)
