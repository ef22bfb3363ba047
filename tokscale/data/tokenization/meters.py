"""How busy each stage of the pipeline is, so that the bottleneck is visible."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Meter:
    """One stage: how long its workers were busy, and with how many images."""

    workers: int = 1
    seconds: float = 0.0
    images: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def busy(self, images: int = 0) -> Iterator[None]:
        """Time a piece of work; safe in several threads."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(time.perf_counter() - began, images)

    def add(self, seconds: float, images: int) -> None:
        """Count a piece of work that was timed elsewhere."""
        with self._lock:
            self.seconds += seconds
            self.images += images

    @property
    def rate(self) -> float:
        """Images per second that the stage could do with all its workers, were it never waiting."""
        return self.images * self.workers / self.seconds if self.seconds else 0.0


class Meters:
    """The stages of one process."""

    def __init__(self, decode_threads: int):
        self.stages = {
            "read": Meter(),
            "decode": Meter(decode_threads),
            "encode": Meter(),
            "pack": Meter(),
        }
        self.waiting = 0
        """Chunks that are decoded or being decoded and wait to be encoded."""
        self._began = time.perf_counter()

    def __getitem__(self, stage: str) -> Meter:
        return self.stages[stage]

    @property
    def bottleneck(self) -> str:
        """The stage that could do the fewest images per second."""
        rates = {name: meter.rate for name, meter in self.stages.items() if meter.images}
        return min(rates, key=lambda name: rates[name]) if rates else "read"

    def metrics(self) -> dict[str, float | int | str]:
        """Rates of all stages, the queue and the bottleneck."""
        rates = {f"{name}/s": round(meter.rate, 1) for name, meter in self.stages.items()}
        return {**rates, "queue": self.waiting, "bottleneck": self.bottleneck}

    def shown(self) -> dict[str, str]:
        """The same in few words, for a progress bar."""
        rates = " ".join(f"{name} {meter.rate:.0f}/s" for name, meter in self.stages.items())
        return {"stages": rates, "queue": str(self.waiting), "bottleneck": self.bottleneck}
