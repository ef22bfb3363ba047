"""A worker: takes units until none is left, whatever happens to it, to others, or to a unit."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tokscale.base.errors import DataError, StopRequested
from tokscale.base.files import write_json
from tokscale.base.log import logger
from tokscale.data.raw.shards import ShardChanged
from tokscale.data.tokenization.config import WorkConfig
from tokscale.data.tokenization.leases import Attempts, Leases
from tokscale.data.tokenization.pipeline import Pipeline
from tokscale.data.tokenization.plan import Plan, Unit
from tokscale.data.tokenization.units import (
    UnitRecord,
    UnitWriter,
    invalidate,
    is_done,
    recorded,
    sweep,
    total_drops,
    unit_writer,
)

log = logger("tokenize")


@dataclass
class WorkReport:
    """How a worker's turn ended."""

    done: list[UnitRecord] = field(default_factory=list)
    """Of units that this worker finished; one for each aspect bucket."""
    failed_for_good: dict[int, str] = field(default_factory=dict)
    """Units that are not tried any more, and why."""
    leased_elsewhere: dict[int, str] = field(default_factory=dict)
    """Units that other workers hold."""
    seconds: float = 0.0
    """How long the turn took."""

    @property
    def units(self) -> int:
        """How many units this worker finished."""
        return len({record.unit for record in self.done})

    @property
    def samples(self) -> int:
        """Samples in the shards that this worker finished."""
        return sum(record.shard.samples for record in self.done)

    @property
    def rate(self) -> float:
        """Samples per second of this worker."""
        return self.samples / self.seconds if self.seconds else 0.0


class Worker:
    """One process that tokenizes."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        pipeline: Pipeline,
        leases: Leases,
        config: WorkConfig,
        *,
        stop: Callable[[], bool],
        progress: Callable[..., None],
        on_unit: Callable[[Mapping[str, Any]], None] = lambda metrics: None,
    ):
        """Prepare; see `run`.

        Args:
            folder: Of token shards.
            plan: What is to be done.
            pipeline: Does it.
            leases: Entered.
            config: How it may fail.
            stop: True ends the turn at the next chunk.
            progress: Called with newly made samples and the metrics to show beside a bar.
            on_unit: Called with the metrics of each finished unit.
        """
        self._folder, self._plan, self._pipeline, self._leases, self._config = folder, plan, pipeline, leases, config
        self._attempts = Attempts(folder, config.max_attempts, config.max_deaths, config.max_drop_fraction)
        self._stop, self._progress, self._on_unit = stop, progress, on_unit
        self._done: set[int] = set()
        self._made = 0
        """Units that this worker took."""
        self._recorded: set[int] = set()
        self._before: set[int] = set()
        """Units that had a record when this turn began: it may be of a damaged shard, and is read."""

    def run(self, *, wait: bool) -> WorkReport:
        """Take units until none is left.

        Args:
            wait: While others still hold units, wait for them, and take over what they leave.

        Raises:
            StopRequested: When asked to stop; what was begun is given back.
            StorageError: When the file system refuses.
        """
        report, began = WorkReport(), time.perf_counter()
        self._before = recorded(self._folder, self._plan)
        while True:
            progressed, failed = False, False
            report.failed_for_good, report.leased_elsewhere = {}, {}
            for unit in self._in_turn():
                outcome = self._try(unit, report)
                progressed |= outcome == "done"
                failed |= outcome == "failed"
            if not failed and not (report.leased_elsewhere and wait):
                report.seconds = time.perf_counter() - began
                return report
            if not progressed:
                self._pause()

    def _in_turn(self) -> Iterator[Unit]:
        """All units, those first that nobody has taken yet, so that workers seldom try for the same.

        Each has an order of its own: in a common one, those that get on equally fast would meet at every gap. After
        each unit that was made, which takes a while, one look into two folders tells what the others have taken and
        finished meanwhile; nothing of theirs is opened for it.
        """
        units = [unit for unit in self._plan.units if unit.number not in self._done]
        random.Random(self._leases.worker.name).shuffle(units)
        later, taken = [], self._look()
        for unit in units:
            if unit.number in taken:
                later.append(unit)
                continue
            made = self._made
            yield unit
            if self._made > made:
                taken = self._look()
        self._look()
        yield from later

    def _look(self) -> set[int]:
        """See what others have finished; the units that they have or had."""
        taken = self._leases.taken()
        self._recorded = recorded(self._folder, self._plan)
        return taken

    def _is_done(self, unit: int) -> bool:
        """Whether a unit is done, as far as was last looked."""
        if unit not in self._recorded:
            return False
        return unit not in self._before or is_done(self._folder, self._plan, unit)

    def _try(self, unit: Unit, report: WorkReport) -> str:
        """What became of a unit: `done`, `failed`, `failed_for_good` or `leased_elsewhere`."""
        if self._stop():
            raise StopRequested("asked to stop; finished units are kept, run the same command to go on")
        if self._is_done(unit.number):
            self._done.add(unit.number)
            return "done"
        if (why := self._attempts.failed_for_good(unit.number, self._pipeline.inputs_of(unit))) is not None:
            report.failed_for_good[unit.number] = why
            return "failed_for_good"
        how = self._leases.claim(unit.number, partial(is_done, self._folder, self._plan, unit.number))
        if how is None and is_done(self._folder, self._plan, unit.number):
            self._done.add(unit.number)
            return "done"
        if how is None:
            report.leased_elsewhere[unit.number] = self._leases.owner(unit.number) or "another worker"
            return "leased_elsewhere"
        self._made += 1
        with self._leases.held(unit.number):
            if is_done(self._folder, self._plan, unit.number):  # finished between looking and claiming
                self._done.add(unit.number)
                return "done"
            if how == "taken over":
                log.warning("unit %d: its worker died; taking it over", unit.number)
                self._attempts.add(unit.number, "died", "its worker died", self._leases.worker)
                sweep(self._folder, self._plan, unit.number)
            return self._make(unit, report)

    def _make(self, unit: Unit, report: WorkReport) -> str:
        inputs = self._pipeline.inputs_of(unit)
        try:
            report.done += self._tokenize(unit)
        except _TooManyDrops as error:
            kind, message, facts = "drops", str(error), {"share": error.share}
        except (ShardChanged, OSError, RuntimeError) as error:
            kind, message, facts = "failed", f"{type(error).__name__}: {error}", {}
        except DataError as error:  # the same files would give the same
            kind, message, facts = "refused", str(error), {}
        else:
            self._done.add(unit.number)
            return "done"
        self._attempts.add(unit.number, kind, message, self._leases.worker, inputs=inputs, **facts)
        log.warning("unit %d failed: %s", unit.number, message)
        return "failed"

    def _tokenize(self, unit: Unit) -> list[UnitRecord]:
        began = time.perf_counter()
        header = {"format": "tokscale-tokens", "version": 1, "run": self._plan.run, "unit": unit.number}
        counted = 0

        def advance(samples: int) -> None:
            nonlocal counted
            counted += samples
            self._progress(samples, **self._pipeline.meters.shown())

        try:
            with ExitStack() as opened:
                writers = {
                    bucket: opened.enter_context(
                        unit_writer(self._folder / bucket, unit, self._plan.run, header, self._leases.worker.name)
                    )
                    for bucket in self._plan.buckets
                }
                self._pipeline.run(unit, writers, advance)
                _check_drops(unit, list(writers.values()), self._config.max_drop_fraction)
                if len(writers) > 1:  # no record of a worker that died between two of them may stand meanwhile
                    for bucket in writers:
                        invalidate(self._folder / bucket, unit.number)
                records = [writer.commit() for writer in writers.values()]
        except BaseException:
            self._progress(-counted)
            raise
        drops, seconds = total_drops(records), time.perf_counter() - began
        self._progress(sum(drops.values()))
        samples = sum(record.shard.samples for record in records)
        metrics = {
            "unit": unit.number,
            "samples": samples,
            "drops": drops,
            "seconds": round(seconds, 3),
            "samples/s": round(samples / seconds, 1),
            "worker": self._leases.worker.name,
            **self._pipeline.meters.metrics(),
        }
        write_json(self._folder / "timings" / f"{unit.number:06d}.json", metrics)
        self._on_unit(metrics)
        return records

    def _pause(self) -> None:
        deadline = time.monotonic() + self._config.retry_seconds
        while time.monotonic() < deadline and not self._stop():
            time.sleep(min(0.1, self._config.retry_seconds))


class _TooManyDrops(DataError):  # noqa: N818 - reads as what was found
    def __init__(self, message: str, share: float):
        super().__init__(message)
        self.share = share


def _check_drops(unit: Unit, writers: Sequence[UnitWriter], most: float) -> None:
    writer, samples_in = writers[0], sum(writer.samples_in for writer in writers)
    unusable = sum(entry.reason != "quality" for entry in writer.rejected)  # what was filtered was asked for
    if unusable > most * samples_in:
        listed = writer.list_rejected()
        reasons = ", ".join(f"{reason} {number}" for reason, number in writer.drops.items())
        raise _TooManyDrops(
            f"{unusable} of {samples_in} samples were left out ({reasons}; each is listed in {listed})",
            unusable / samples_in,
        )
