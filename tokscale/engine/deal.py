"""Tensors that lie in parts on all ranks, dealt out so that each is whole on one of them for a moment."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor

from tokscale.dist.comm import Comm
from tokscale.engine.fragments import ParamSlice


class Deal:
    """Who computes which of some parameters, and which parts of it lie where."""

    def __init__(self, pieces: Sequence[ParamSlice], comm: Comm):
        """Deal and tell the dealt what lies where. Collective: the same parameters in the same order on every rank.

        Args:
            pieces: This rank's parts.
            comm: The job.
        """
        self._comm = comm
        owners = dealt([piece.shape for piece in pieces], comm.world)
        self._order = sorted(range(len(pieces)), key=lambda number: owners[number])
        """By owner; within one, as given."""
        self._counts = [pieces[number].count for number in self._order]
        self._sent = [sum(pieces[n].count for n in self._order if owners[n] == rank) for rank in range(comm.world)]
        self._mine = [pieces[number].shape for number in self._order if owners[number] == comm.rank]
        # From every rank, where its parts of our tensors begin and how long they are.
        held = [owners.count(rank) for rank in range(comm.world)]
        told = torch.tensor([[pieces[n].start, pieces[n].count] for n in self._order], dtype=torch.int64)
        where = torch.empty((comm.world * len(self._mine), 2), dtype=torch.int64, device=comm.device)
        torch_dist.all_to_all_single(where, told.to(comm.device), [len(self._mine)] * comm.world, held)
        self._where: list[list[list[int]]] = where.view(comm.world, len(self._mine), 2).tolist()
        self._received = [sum(count for _, count in parts) for parts in self._where]

    def apply(self, parts: Sequence[Tensor], function: Callable[[Tensor, tuple[int, ...]], Tensor]) -> None:
        """Replace parts by those of `function(whole, shape)`, in place. Collective: two exchanges.

        Args:
            parts: Flat, of the pieces; equal dtypes.
            function: From a flat tensor to one of the same size.
        """
        device, kind = self._comm.device, parts[0].dtype
        out = torch.cat([parts[number].to(device) for number in self._order])
        arrived = torch.empty(sum(self._received), dtype=kind, device=device)
        torch_dist.all_to_all_single(arrived, out, self._received, self._sent)
        whole = [torch.empty(math.prod(shape), dtype=kind, device=device) for shape in self._mine]
        at = 0
        for places in self._where:
            for tensor, (start, count) in zip(whole, places, strict=True):
                tensor[start : start + count] = arrived[at : at + count]
                at += count
        done = [function(tensor, shape) for tensor, shape in zip(whole, self._mine, strict=True)]
        back = [
            tensor[start : start + count]
            for places in self._where
            for tensor, (start, count) in zip(done, places, strict=True)
        ]
        torch_dist.all_to_all_single(out, torch.cat(back) if back else arrived, self._sent, self._received)
        for number, part in zip(self._order, out.split(self._counts), strict=True):
            parts[number].copy_(part)


def dealt(shapes: Sequence[tuple[int, ...]], world: int) -> list[int]:
    """An owner for each matrix: the largest products first, each to the rank that has least to do."""
    costs = [math.prod(shape) * min(shape[0], math.prod(shape[1:])) for shape in shapes]
    owners, load = [0] * len(shapes), [0] * world
    for number in sorted(range(len(shapes)), key=lambda number: (-costs[number], number)):
        owners[number] = min(range(world), key=lambda rank: (load[rank], rank))
        load[owners[number]] += costs[number]
    return owners
