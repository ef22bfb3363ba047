"""Which rank is slower than the rest: a score that ends up in the metrics, and a warning that names it.

A step takes equally long on every rank, since all wait for the slowest, so what counts is the time of a rank's own:
waiting for its data, and work that no other rank can delay. On a CPU the latter is the process's processor time, of
which waiting in a collective takes none. On a GPU the two cannot be told apart from the outside; there, a fixed
product of matrices is timed, which shows a device that is throttled or broken.
"""

import statistics
import time
from collections.abc import Sequence

import torch

from tokscale.base.log import logger
from tokscale.dist.comm import Comm
from tokscale.dist.slurm import node_name

log = logger("stragglers")

THRESHOLD, LEAST, WINDOWS = 1.15, 0.05, 3
"""Warned of: more than so many times the median and so many seconds a step, so many readings in a row."""
_PROBE_SIZE, _PROBE_REPEATS = 2048, 8


class Stragglers:
    """Compares the ranks from one reading to the next. Says nothing in a world of one."""

    def __init__(self, comm: Comm):
        """Compare the ranks of `comm`."""
        self._comm = comm
        self._probe = torch.ones(_PROBE_SIZE, _PROBE_SIZE, device=comm.device) if comm.device.type == "cuda" else None
        if self._probe is not None:
            torch.mm(self._probe, self._probe)  # so that no reading counts the start of the library
        self._probed: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._suspect, self._times, self._score = -1, 0, 0.0
        self._restart()

    def count(self, waited: float) -> None:
        """One step was done, for whose batch this rank waited so many seconds."""
        self._waited += waited
        self._steps += 1

    def own(self) -> list[float]:
        """This rank's own time a step since the last call, at its place among all ranks'; for the step's message."""
        if self._comm.world == 1:
            return []
        mine = (self._waited + self._work()) / max(self._steps, 1)
        self._restart()
        # A sum in which each rank fills its own place: one small message, and nothing to pickle.
        return [mine * (rank == self._comm.rank) for rank in range(self._comm.world)]

    def read(self, times: Sequence[float]) -> dict[str, float]:
        """Of all ranks' times: `straggler_score`, the slowest one's over the median, and `straggler_rank`."""
        if not any(times):
            return {}
        score, slowest = straggler_score(times)
        late = score > THRESHOLD and times[slowest] * (1 - 1 / score) > LEAST
        self._times = int(late) * (self._times + 1 if slowest == self._suspect else 1)
        self._suspect, self._score = slowest, score
        if self._times == WINDOWS and slowest == self._comm.rank:  # who is late says so: it knows its machine
            log.warning(
                "rank %d on %s is slow: %.0f ms of its own a step, %.2f times the median, in %d readings in a row",
                slowest,
                node_name(),
                1e3 * times[slowest],
                score,
                WINDOWS,
            )
        return {"straggler_score": score, "straggler_rank": float(slowest)}

    def slow_rank(self, times_the_median: float) -> int | None:
        """Who was slower than that in the last reading, and late in those before it; the same on every rank."""
        return self._suspect if self._times >= WINDOWS and self._score > times_the_median else None

    def _work(self) -> float:
        if self._probe is None:
            return time.process_time() - self._processor
        # What the last probe took: it has long run, so that nothing waits. Then the next one.
        seconds = 0.0
        if self._probed is not None and self._probed[1].query():
            seconds = self._probed[0].elapsed_time(self._probed[1]) / 1e3
        self._probed = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._probed[0].record()
        for _ in range(_PROBE_REPEATS):
            torch.mm(self._probe, self._probe)
        self._probed[1].record()
        return seconds * self._steps  # as if every step held one probe

    def _restart(self) -> None:
        self._waited, self._steps, self._processor = 0.0, 0, time.process_time()


def straggler_score(times: Sequence[float]) -> tuple[float, int]:
    """The largest of the ranks' times over their median (the lower one, so that of two ranks one can be slow)."""
    slowest = max(range(len(times)), key=times.__getitem__)
    return times[slowest] / max(statistics.median_low(times), 1e-9), slowest
