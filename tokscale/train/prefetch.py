"""The batches of a run, read two ahead: a rank that cannot read says so in a step's message, and goes on until then.

Ranks that wait in a collective for one that has left hear of a broken connection, and of nothing else. The message of
step `i` is read once step `i + 1` is queued, and says of every rank whether it holds the batch of step `i + 2`. So each
rank knows before it begins a step that all others will.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokscale.base.batch import Batch
from tokscale.base.protocols import Loader
from tokscale.dist.comm import Comm

AHEAD = 2
"""Batches held ready beside the one in use."""


@dataclass(frozen=True)
class _Read:
    batch: Batch
    before: dict[str, Any]
    """State of the loader before it read this batch."""
    there: torch.cuda.Event | None
    """When its copy is on the device; None where nothing is copied."""


class SideStream:
    """Copies batches to a CUDA device beside what it computes, from pinned memory."""

    def __init__(self, device: torch.device):
        """A stream of its own."""
        self._device, self._stream = device, torch.cuda.Stream(device)

    def bring(self, read: Callable[[], Batch]) -> tuple[Batch, torch.cuda.Event]:
        """What `read` gives, on its way to the device, and when it will be there.

        Whatever `read` itself does on the device, such as letting a text encoder read captions, runs beside the step,
        too.
        """
        with torch.cuda.stream(self._stream):
            batch = read().pinned().to(self._device)
            there = torch.cuda.Event()
            there.record(self._stream)
        return batch, there

    def take(self, batch: Batch, there: torch.cuda.Event) -> None:
        """Let kernels that are queued from here on wait for the copy, and its memory for them; the host goes on."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(there)
        for tensor in batch.tensors():
            tensor.record_stream(current)


class Prefetcher:
    """The next batches of a loader, held ready, up to a number of them in all."""

    def __init__(self, loader: Loader, comm: Comm):
        """Read nothing yet."""
        self._loader, self._comm = loader, comm
        self._side = SideStream(comm.device) if comm.device.type == "cuda" else None
        self._held: deque[_Read] = deque()
        self._failure: Exception | None = None
        self._state: dict[str, Any] = {}
        self._left, self._waited = 0, 0.0
        self._sure: int | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank could not read a batch ahead."""
        return self._failure is not None

    @property
    def exhausted(self) -> bool:
        """Whether some rank is known to be without the next batch: `next` then raises, on every rank."""
        return self._sure == 0

    def start(self, batches: int) -> None:
        """Read the first ones of `batches` in all. Collective.

        Raises:
            Exception: What a rank failed with on the very first one, on every rank.
        """
        self._left, self._sure = batches, None
        for _ in range(min(AHEAD, batches)):
            self.prefetch()
        # The first messages come too late for these.
        held = len(self._held) if self.failed else AHEAD
        least = -self._comm.max(-float(held))
        if least < AHEAD:
            self._sure = int(least)

    def prefetch(self) -> None:
        """Read one more batch, if any is left. A failure is kept until every rank knows of it."""
        if self.failed or not self._left:
            return
        self._left -= 1
        self._state = self._loader.state_dict()
        began = time.perf_counter()
        there = None
        try:
            if self._side is None:
                batch = self._loader.next_batch()
            else:
                batch, there = self._side.bring(self._loader.next_batch)
        except Exception as error:
            self._failure = error
        else:
            self._held.append(_Read(batch, self._state, there))
        self._waited += time.perf_counter() - began

    def note_peers(self, any_failed: bool, ahead: int) -> None:
        """What a message said of all ranks' `failed`.

        Args:
            any_failed: Some rank could not read the last batch that it tried to.
            ahead: Batches before that one which have not been taken yet.
        """
        if any_failed and self._sure is None:
            self._sure = ahead

    def next(self) -> tuple[Batch, float]:
        """The next batch, and the seconds spent on reading since the last call. Collective when `exhausted`.

        Raises:
            Exception: What a rank failed with, on every rank.
        """
        if self.exhausted:
            with self._comm.raise_together("reading the data"):
                if self._failure is not None:
                    raise self._failure
        if self._sure is not None:
            self._sure -= 1
        waited, self._waited = self._waited, 0.0
        read = self._held.popleft()
        if self._side is not None and read.there is not None:
            self._side.take(read.batch, read.there)
        return read.batch, waited

    def state_dict(self) -> dict[str, Any]:
        """Of the loader, as it was before it read the first batch that is not taken yet."""
        if self._held:
            return self._held[0].before
        return self._state if self.failed else self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the loader stood."""
        self._held.clear()
        self._failure = self._sure = None
        self._loader.load_state_dict(state)
