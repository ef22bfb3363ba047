"""Batches go to a CUDA device on a stream of their own. No device is needed to see in which order that is asked for."""

from contextlib import contextmanager

import torch

from tokscale.base.batch import TokenBatch
from tokscale.train.prefetch import SideStream

DEVICE = torch.device("cuda", 0)


def test_a_copy_runs_beside_the_step_and_only_kernels_wait_for_it(monkeypatch):
    seen: list[str] = []

    class Stream:
        def __init__(self, device: torch.device | None = None, name: str = "side"):
            self.name = name

        def wait_event(self, event: "Event") -> None:
            seen.append(f"{self.name} waits for {event.name}")

    class Event:
        def record(self, stream: Stream) -> None:
            self.name = "the copy"
            seen.append(f"{stream.name} notes {self.name}")

    @contextmanager
    def on(stream: Stream):
        seen.append(f"to {stream.name}")
        yield
        seen.append(f"from {stream.name}")

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        seen.append(f"copy {'without' if non_blocking else 'with'} a wait")
        return tensor

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        seen.append("pin")
        return tensor

    def kept(tensor: torch.Tensor, stream: Stream) -> None:
        seen.append(f"memory waits for {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name="main"))
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", kept)

    ids = torch.ones(2, 3, dtype=torch.int64)
    batch = TokenBatch(torch.arange(2), ids, ids > 0, ids, keys=("a", "b"), extra={"labels": ids})

    def read() -> TokenBatch:
        seen.append("read")
        return batch

    side = SideStream(DEVICE)
    brought, there = side.bring(read)
    assert seen == [
        "to side",
        "read",
        *["pin"] * 5,
        *["copy without a wait"] * 5,
        "side notes the copy",
        "from side",
    ]
    seen.clear()
    side.take(brought, there)
    assert seen == ["main waits for the copy", *["memory waits for main"] * 5]
    assert brought.keys == ("a", "b")
