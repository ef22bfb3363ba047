"""Training steps of a model on a batch of random ids, and what one of them does to the device: for benches."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tokscale.base import rng
from tokscale.base.batch import LABELS, TokenBatch
from tokscale.base.protocols import Engine, LossModel
from tokscale.bench.live import Launches, LiveBytes
from tokscale.dist.comm import Comm
from tokscale.engine.build import build_engine
from tokscale.engine.config import ScheduleConfig
from tokscale.models.registry import build_model
from tokscale.nn.attention.pattern import AttentionPattern

TOTAL_STEPS = 1_000_000


class Stepper:
    """An engine and a batch; a call is a training step, queued as the loop queues it."""

    def __init__(self, model: Any, engine: Any, optim: Any, comm: Comm, batch: TokenBatch, first: int = 0):
        """Build.

        Args:
            model: Fitted configuration.
            engine: Its configuration.
            optim: Of the optimizer.
            comm: The job.
            batch: Of one rank, on its device.
            first: Steps that were done before.
        """

        def make() -> torch.nn.Module:
            with rng.scope(0, "init", "bench"):
                return build_model(model)

        self.batch, self._comm, self.done = batch, comm, first
        self.engine: Engine = build_engine(
            "model",
            make,
            config=engine,
            optimizer=optim,
            schedule=ScheduleConfig(kind="constant"),
            comm=comm,
            micro_batches=1,
            micro_batch_size=len(batch),
            total_steps=TOTAL_STEPS,
        )

    def __call__(self) -> Tensor:
        """One step; its loss, which is on its way."""
        with rng.scope(0, "bench", self.done, device=self._comm.device):
            loss = self.engine(self.batch).total
            self.engine.backward(loss)
            self.engine.step(self.done)
        self.done += 1
        return loss.detach()


def filled(example: TokenBatch, device: torch.device, *, codes: int, words: int) -> TokenBatch:
    """A batch of an example's shapes on `device`, its ids drawn at random; labels are of the first classes.

    Args:
        example: On the meta device.
        device: Where it is to lie.
        codes: Entries of the codebook.
        words: Entries of the text tokenizer; 0 stays padding.
    """
    draw = rng.generator(0, "bench", "batch")

    def fill(tensor: Tensor, most: int) -> Tensor:
        if tensor.dtype == torch.bool:
            return torch.ones(tensor.shape, dtype=torch.bool, device=device)
        if tensor.dtype.is_floating_point:
            return torch.randn(tensor.shape, generator=draw).to(device, tensor.dtype)
        return torch.randint(1, most, tensor.shape, generator=draw).to(device)

    return TokenBatch(
        positions=torch.arange(len(example), device=device),
        text=fill(example.text, words),
        text_mask=fill(example.text_mask, 2),
        codes=fill(example.codes, codes),
        extra={name: fill(tensor, 2 if name == LABELS else codes) for name, tensor in example.extra.items()},
    )


class Peak:
    """The most bytes that tensors held on a device; counted by operations where it is no CUDA device."""

    def __init__(self, device: torch.device):
        self._device, self._live = device, None if device.type == "cuda" else LiveBytes()
        if self._live is None:
            settle(device)
            self._before = torch.cuda.memory_allocated(device)

    def __enter__(self) -> "Peak":
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._live is not None:
            self._live.restart()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)

    def bytes(self) -> float:
        """Since the beginning or the last restart, without what was there before."""
        if self._live is not None:
            return float(self._live.peak)
        return float(torch.cuda.max_memory_allocated(self._device) - self._before)


def settle(device: torch.device) -> None:
    """Free what nobody holds any more, and wait for the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def launched(call: Callable[[], object], device: torch.device) -> tuple[int, float | None]:
    """Kernels that a call launches, and the share of its time in which the device ran none.

    On a CPU: operations that would be kernels, and None.
    """
    if device.type != "cuda":
        with Launches() as launches:
            call()
        return launches.count, None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(2):  # the first call fills the queue, as those of a run find it
            call()
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or ()
        if event.device_type == DeviceType.CUDA
    ]
    return round(len(spans) / 2), idle_share(spans)


def host_waits(call: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for a CUDA device in a call, by torch's own count; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def idle_share(spans: list[tuple[float, float]]) -> float | None:
    """Of the time between the first beginning and the last end, what lies in no span; None without any."""
    if not spans:
        return None
    spans = sorted(spans)
    busy, (begin, end) = 0.0, spans[0]
    for start, stop in spans[1:]:
        if start > end:
            busy, begin, end = busy + end - begin, start, stop
        end = max(end, stop)
    busy += end - begin
    whole = end - spans[0][0]
    return 1 - busy / whole if whole else 0.0


def full_train_flops(model: LossModel) -> float:
    """`train_flops` by the other convention: as if every position saw every one (PaLM, arXiv:2204.02311)."""
    with mock.patch.object(AttentionPattern, "pairs", lambda pattern, length: length * length):
        return model.train_flops()


@contextmanager
def no_leftovers(device: torch.device) -> Iterator[None]:
    """What is built inside and not kept is gone afterwards, so that the next setting finds the device as it was."""
    settle(device)
    try:
        yield
    finally:
        settle(device)
