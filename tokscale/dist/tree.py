"""Control messages along a tree of ranks: what one rank sends does not grow with their number.

A ring (gloo's collectives of objects and small sums) has 2 (n - 1) hops, and a full mesh n - 1 connections a rank. Here
a rank speaks with its parent and at most `FANOUT` children, so a message to all and back has 2 log n hops, and gloo,
which connects when it is first spoken through, connects no more than that.
"""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as torch_dist

FANOUT = 16
_INLINE = 4096
"""Bytes of a frame: a message that fits it is one send, a longer one two."""
_HEAD = 8
LAZY = "TORCH_GLOO_LAZY_INIT"
"""Tells gloo to connect two ranks when they first speak."""


def connect_lazily() -> None:
    """Before a process group is made. Whoever has set the variable is obeyed."""
    os.environ.setdefault(LAZY, "1")


@dataclass
class Traffic:
    """What one rank has sent over its lines so far."""

    messages: int = 0
    bytes: int = 0
    peers: set[int] = field(default_factory=set)
    """Whom it spoke to."""

    def as_dict(self) -> dict[str, int]:
        """JSON-ready."""
        return {"messages": self.messages, "bytes": self.bytes, "peers": len(self.peers)}


class Line:
    """One conversation between all ranks. Several may be open at once, each of one thread and with a tag of its own."""

    def __init__(self, rank: int, world: int, tag: int, traffic: Traffic):
        """Nothing is sent. Needs the default process group to have a CPU backend.

        Args:
            rank: Ours.
            world: Ranks.
            tag: Of this line, equal on all ranks.
            traffic: Counts what is sent.
        """
        self._rank, self._tag, self._traffic = rank, tag, traffic
        self._parent = (rank - 1) // FANOUT if rank else None
        self._children = range(min(FANOUT * rank + 1, world), min(FANOUT * (rank + 1) + 1, world))

    def reduce(self, value: Any, join: Callable[[Any, Any], Any]) -> Any:
        """Everyone's values joined, on rank 0; elsewhere those of the ranks below.

        Args:
            value: Ours.
            join: Associative; the order of the values is that of the tree, equal from run to run.
        """
        for child in self._children:
            value = join(value, pickle.loads(self._receive(child)))
        if self._parent is not None:
            self._send(pickle.dumps(value), self._parent)
        return value

    def gather(self, value: Any) -> list[Any] | None:
        """Everyone's values in rank order, on rank 0; None elsewhere."""
        # Pickled once: who passes them on does not look inside.
        packed = self.reduce({self._rank: pickle.dumps(value)}, lambda mine, theirs: mine | theirs)
        if self._parent is not None:
            return None
        return [pickle.loads(packed[rank]) for rank in sorted(packed)]

    def tell(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        data = pickle.dumps(value) if self._parent is None else self._receive(self._parent)
        for child in self._children:
            self._send(data, child)
        return value if self._parent is None else pickle.loads(data)

    def _send(self, data: bytes, to: int) -> None:
        frame = bytearray(_INLINE)
        frame[:_HEAD] = len(data).to_bytes(_HEAD, "little")
        first = data[: _INLINE - _HEAD]
        frame[_HEAD : _HEAD + len(first)] = first
        self._post(frame, to)
        if rest := data[_INLINE - _HEAD :]:
            self._post(bytearray(rest), to)

    def _post(self, data: bytearray, to: int) -> None:
        torch_dist.send(torch.frombuffer(data, dtype=torch.uint8), to, tag=self._tag)
        self._traffic.messages += 1
        self._traffic.bytes += len(data)
        self._traffic.peers.add(to)

    def _receive(self, source: int) -> bytes:
        frame = self._fetch(_INLINE, source)
        size = int.from_bytes(frame[:_HEAD], "little")
        data = bytes(frame[_HEAD : _HEAD + size])
        if (missing := size - len(data)) > 0:
            data += self._fetch(missing, source)
        return data

    def _fetch(self, size: int, source: int) -> bytearray:
        data = bytearray(size)
        torch_dist.recv(torch.frombuffer(data, dtype=torch.uint8), source, tag=self._tag)
        return data
