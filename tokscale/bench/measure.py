"""Side-by-side measurements on one thread or one GPU: interleaved rounds, the best of each side; peak memory.

On the CPU the clock is the process's own CPU time, so that neighbours on the machine count as little as they can.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MATRIX_PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
"""Operations that count as matrix products; those inside fused attention are left out."""


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Seconds of one call of each side: the least over `rounds`, after a round that is not counted."""
    device, best = torch.device(device), dict.fromkeys(sides, float("inf"))
    with one_thread():
        for number in range(rounds + 1):
            for name, call in sides.items():
                taken = seconds_of(call, device)
                best[name] = min(best[name], taken) if number else best[name]
    return best


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's operations inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu", *, settle: bool = True) -> float | None:
    """How far memory rises above its level during one call; None where the system does not say.

    A call before it lets allocators and caches settle, unless there was one (`settle=False`).
    """
    device = torch.device(device)
    if settle:
        call()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return float(torch.cuda.max_memory_allocated(device) - before)
    try:
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the level
    except OSError:
        return None
    call()
    return _status("VmHWM") - before


def matrix_share(call: Callable[[], object]) -> float:
    """Share of a call's time on the CPU that is spent in matrix products, by torch's profiler; a call goes before."""
    with one_thread():
        call()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            call()
    spent = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return sum(spent.get(name, 0.0) for name in MATRIX_PRODUCTS) / sum(spent.values())


def resident_bytes() -> float:
    """Memory of this process but for pages that are free and only held, which would hide a rise.

    Raises:
        OSError: Where the system does not say.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def row(
    name: str, ours: float, baseline: float, unit: str, target: float | None = None, *, more_is_better: bool = False
) -> dict[str, Any]:
    """One row of a report; its ratio is above 1 where ours is better."""
    ratio = ours / baseline if more_is_better else baseline / ours
    return {"name": name, "ours": ours, "baseline": baseline, "unit": unit, "ratio": ratio, "target": target}


def figure(name: str, ours: float, unit: str) -> dict[str, Any]:
    """A row that has nothing to stand beside."""
    return {"name": name, "ours": ours, "baseline": None, "unit": unit, "ratio": None, "target": None}


def skipped(name: str, reason: str) -> dict[str, Any]:
    """In the place of a row that cannot be measured here."""
    return {"name": name, "skipped": reason}


def failed(name: str, reason: str) -> dict[str, Any]:
    """In the place of rows that should have been measured, where the others are worth having without them."""
    return {"name": name, "failed": reason}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """CPU time of one call on the CPU, time between synchronisations on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - began
    began = time.process_time()
    call()
    return time.process_time() - began


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {key}")
