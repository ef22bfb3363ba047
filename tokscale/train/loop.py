"""The training loop: the same one for every model and tokenizer.

It knows a task of named engines, a loader, a checkpoint store and the ranks, and no model. Whatever happens between two
steps (save, stop, report) is agreed on by all ranks in the message that each engine's step sends anyway. The host reads
the message of a step when the next one is queued, so that the device never waits for it: what is decided from it takes
effect one step later. Only a step that saves, the last one, and the first one of a process wait for their own.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field

from tokscale.base import rng
from tokscale.base.batch import StepResult
from tokscale.base.config import Config
from tokscale.base.errors import NonFiniteError, StopRequested
from tokscale.base.log import logger
from tokscale.base.progress import Progress, progress
from tokscale.base.protocols import Loader, LossModel, TrainTask
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.store import CheckpointStore
from tokscale.dist.comm import Comm
from tokscale.dist.message import Value
from tokscale.dist.slurm import EndOfAllocation, node_name
from tokscale.train.hooks import Hook
from tokscale.train.inflight import PREFIX, Idle, InFlight, StepMessage
from tokscale.train.ledger import Ledger
from tokscale.train.metrics import Meter, MetricsWriter, finite, memory
from tokscale.train.prefetch import Prefetcher
from tokscale.train.signals import StopRequests, TimeToStop
from tokscale.train.stragglers import Stragglers
from tokscale.train.trackers import TrackerName
from tokscale.train.watchdog import Watchdog, WatchdogConfig

log = logger("train")

Metrics = dict[str, float | None]
_REQUEST, _MEMORY = "request/", "memory/"


class LoopConfig(Config):
    """How long to train and how often to look."""

    total_steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the whole run, resumed parts included. The learning-rate schedule spans it."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of `metrics.jsonl`; the last step is always written."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where people look at the run, beside `metrics.jsonl`: `tensorboard`, `wandb`, `mlflow`, by the same names."""
    max_nonfinite: int = Field(default=10, ge=0)
    """Steps in a row whose loss or gradient may be non-finite: each is dropped before any update. One more ends the
    run with exit code 77."""
    time_limit_minutes: float | None = Field(default=None, gt=0)
    """Save and stop, to be requeued, once this process has trained so long."""
    end_margin_seconds: float = Field(default=120.0, ge=0)
    """Under a scheduler: save and stop, likewise, when so little is left of the job's time, or less than twice what a
    step and a save have taken lately; but not before its last quarter."""
    exclude_slower_than: float = Field(default=1.5, ge=0)
    """Under Slurm: when the job comes again, leave out the node whose rank was so many times slower than the median in
    the last readings (`straggler_score`); 0 leaves out none. At most `cluster.max_bad_nodes` times."""


@dataclass(frozen=True)
class TrainResult:
    """A run that reached its last step."""

    step: int
    """Optimizer steps done, over all parts of the run."""
    first_step: int
    """Where this process took it up."""
    seconds: float
    """Spent in the loop by this process."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """The last line of `metrics.jsonl`; empty when there was nothing left to do."""


class Trainer:
    """Runs a task to its last step, taking up whatever an earlier process of the same run has saved."""

    def __init__(
        self,
        task: TrainTask,
        loader: Loader,
        *,
        config: LoopConfig,
        store: CheckpointStore,
        comm: Comm,
        run_dir: Path,
        hooks: Sequence[Hook] = (),
        seed: int = 0,
        peak_flops: float | None = None,
        watchdog: Watchdog | None = None,
        run_metadata: Mapping[str, Any] | None = None,
        earlier: Callable[[int], tuple[float, float]] | None = None,
    ):
        """Join the parts; nothing runs yet.

        Args:
            task: What a step means, and the engines whose state is saved.
            loader: This rank's share of the global batches.
            config: Length and cadence.
            store: Where checkpoints are saved to and resumed from.
            comm: The ranks of this job.
            run_dir: Gets the metrics; a file `STOP` or `SAVE` in it is a request.
            hooks: Called in this order.
            seed: Base of the random stream that torch's default generator follows in each step.
            peak_flops: Of one rank's device, for MFU; see `train.hardware`.
            watchdog: Told of every phase; who makes it runs it.
            run_metadata: JSON-ready, equal on all ranks, kept in every checkpoint for whoever reads it without the run.
            earlier: For `goodput` in the metrics, see `runs.goodput`: when the run was first submitted, and the useful
                seconds of its earlier processes up to a step.
        """
        self.task, self.config, self.store, self.comm = task, config, store, comm
        self._prefetcher = Prefetcher(loader, comm)
        self.run_dir, self.hooks, self.seed = run_dir, tuple(hooks), seed
        flops = sum(cast(LossModel, engine.model).train_flops() for engine in task.engines.values())
        self._meter = Meter(world=comm.world, flops_per_sample=flops, peak_flops=peak_flops)
        self._stragglers = Stragglers(comm)
        self._beat = (watchdog or Watchdog(WatchdogConfig(enabled=False), comm, run_dir)).beat
        self._run_metadata = dict(run_metadata or {})
        self._nonfinite = self._nonfinite_in_a_row = 0
        self._saved = 0
        self._owed = False
        """A save that was due fell to a dropped step; the next sound one makes up for it."""
        self._last: Metrics = {}
        self._end_of_step: torch.cuda.Event | None = None
        self._finished = 0
        self._to_stop = TimeToStop()
        self._earlier = earlier
        self._ledger = Ledger(run_dir, 0, writes=False)

    def _writer(self, step: int) -> MetricsWriter:
        return MetricsWriter(self.run_dir, step, self.config.trackers, self._run_metadata.get("config"))

    def run(self) -> TrainResult:
        """Train up to `total_steps`. Collective.

        Raises:
            StopRequested: When a signal, a file or the time limit asked for it; the state is saved.
            NonFiniteError: When more than `max_nonfinite` steps in a row were not finite, when the last of the run
                was not, or when a state that was to be saved is not.
            CheckpointError: When the run folder's checkpoints cannot be resumed from.
        """
        began, total = time.monotonic(), self.config.total_steps
        limit = self.config.time_limit_minutes
        first = step = self._finished = self._resume()
        earlier = self._earlier(step) if self._earlier is not None and self.comm.is_main else None
        self._ledger = Ledger(self.run_dir, step, writes=self.comm.is_main, earlier=earlier)
        metrics: Metrics = {}
        queued: deque[InFlight] = deque()
        writer = self._writer(step) if self.comm.is_main else None
        end = EndOfAllocation(self.config.end_margin_seconds) if self.comm.is_main else None
        requested = StopRequests(
            self.run_dir,
            is_main=self.comm.is_main,
            deadline=limit and began + 60 * limit,
            ending=None if end is None else lambda: end.near(self._to_stop.seconds(self.store.seconds)),
        )
        try:
            with (
                self.store,
                requested as requests,
                progress(total, "training", start=step, quiet=not self.comm.is_main) as bar,
            ):
                for hook in self.hooks:
                    hook.on_begin(step, writer)
                if step < total and not self._ended:
                    self._enter("first data", step)
                    self._prefetcher.start(total - step)
                while step < total and not self._ended:
                    queued.append(self._begin(step, requests))
                    step += 1
                    asked: set[str] = set()
                    wait = step in (first + 1, total) or self._needs_state(step)
                    while len(queued) > 1 or (queued and (wait or asked or self._prefetcher.exhausted)):
                        metrics = self._finish(queued.popleft(), step, asked, writer, bar)
                    self._enter("save", step)
                    self._save_or_stop(step, asked, requests)
        finally:
            self._ledger.write(self._finished)
            if writer is not None:
                writer.close()
        for hook in self.hooks:
            hook.on_end(step)
        return TrainResult(step=step, first_step=first, seconds=time.monotonic() - began, metrics=metrics)

    def _enter(self, phase: str, step: int) -> None:
        self._ledger.enter(phase)
        self._beat(phase, step)

    def _begin(self, step: int, requests: StopRequests) -> InFlight:
        """Queue one batch and one update, and what this rank has to tell the others."""
        self._enter("data", step)
        self._prefetcher.prefetch()
        batch, waited = self._prefetcher.next()
        self._enter("step", step)
        self._stragglers.count(waited)
        notes = self._notes(step + 1, requests)
        for engine in self.task.engines.values():
            engine.carry(notes)
        idle = Idle(self._end_of_step) if self.comm.device.type == "cuda" else None
        with rng.scope(self.seed, "train", step, self.comm.rank, device=self.comm.device):
            result = self.task.step(batch, step)
        flight = InFlight(step, batch, waited, result, notes, self.comm)
        if idle is not None:
            flight.idle, self._end_of_step = idle, Idle.mark()
        return flight

    def _notes(self, step: int, requests: StopRequests) -> dict[str, Value]:
        """What the message of the step that makes it `step` steps carries for the loop."""
        notes: dict[str, Value] = {_REQUEST + name: float(asked) for name, asked in requests.flags().items()}
        notes["unread"] = float(self._prefetcher.failed)
        notes["saving"] = float(self.store.saving)
        if self._reports(step):
            notes |= {_MEMORY + name: value for name, value in memory(self.comm.device).items()}
            notes["own"] = self._stragglers.own()
        return {PREFIX + name: value for name, value in notes.items()}

    def _finish(
        self, flight: InFlight, queued: int, asked: set[str], writer: MetricsWriter | None, bar: Progress
    ) -> Metrics:
        """Read a step's message, `queued` steps having been queued, and do what follows from it but save and stop."""
        step = self._finished = flight.step + 1
        self._enter("exchange", step)
        message = flight.read()
        self._to_stop.step()
        asked |= {
            name.removeprefix(_REQUEST)
            for name, sum_ in message.totals.items()
            if name.startswith(_REQUEST) and sum_ > 0
        }
        self._prefetcher.note_peers(message.totals["unread"] > 0, ahead=step + 1 - queued)
        if not message.totals["saving"]:  # else it would cost a message of its own at every step
            self.store.poll()
        self._meter.count(flight.batch, flight.waited, flight.idle and flight.idle.seconds(), flight.queued_at)
        self._check_finite(flight.step, flight.result)
        metrics: Metrics = {**message.metrics, **_reported(flight.result), **self._measured(step)}
        self._last = dict(metrics)
        self._enter("report", step)
        if self._reports(step):
            metrics = self._report(step, metrics, message, writer, bar)
        bar.update(1)
        self._enter("hooks", step)
        for hook in self.hooks:
            hook.on_step(step, metrics)
            asked |= {"hook"} if hook.wants_save else set()
        return metrics

    def _measured(self, step: int) -> dict[str, float]:
        """What hooks have to say of a step, outside the clock of the rates."""
        measuring = [hook for hook in self.hooks if hook.measures(step)]
        if not measuring:
            return {}
        self._enter("measure", step)
        began, found = time.perf_counter(), dict[str, float]()
        for hook in measuring:
            found |= hook.measure(step)
        self._meter.leave_out(time.perf_counter() - began)
        return found

    @property
    def _ended(self) -> bool:
        return any(hook.ended for hook in self.hooks)

    def _reports(self, step: int) -> bool:
        return (
            step % self.config.log_every == 0
            or step == self.config.total_steps
            or any(hook.measures(step) for hook in self.hooks)
        )

    def _needs_state(self, step: int) -> bool:
        """Whether something reads the state as `step` steps leave it: the next one must not be queued yet."""
        return self._owed or self.store.due(step) or any(hook.due(step) or hook.measures(step) for hook in self.hooks)

    def _save_or_stop(self, step: int, asked: set[str], requests: StopRequests) -> None:
        """What is due after step number `step`; the same on every rank."""
        last, dropped = step == self.config.total_steps or self._ended, self._nonfinite_in_a_row > 0
        due = self._owed or last or bool(asked) or self.store.due(step)
        if due and not dropped:
            self._save(step)
        self._owed = due and dropped
        if last and dropped:
            raise self._not_finite(
                f"the last {self._nonfinite_in_a_row} of {step} steps were dropped, since their loss or gradient was "
                "not finite"
            )
        if "save" in asked:
            requests.acknowledge("save")
        if "stop" in asked and not last:
            reason = requests.reason() or "stop requested on another rank"
            requests.acknowledge("stop")
            self.store.close()
            state = "the state is saved" if not dropped else f"it was dropped as not finite; {self._what_is_saved()}"
            message = f"stopped after step {step} ({reason}); {state}, the same command goes on"
            again = "requeue" in asked
            raise StopRequested(message, again=again, exclude=self._slow_nodes() if again else ())

    def _slow_nodes(self) -> tuple[str, ...]:
        """The node that all others have waited for, if it was much slower than they. Collective."""
        least = self.config.exclude_slower_than
        rank = self._stragglers.slow_rank(least) if least else None
        return () if rank is None else (self.comm.gather_objects(node_name())[rank],)

    def _resume(self) -> int:
        checkpoint = self.store.resume(self.task.engines, self._take_over)
        if checkpoint is None:
            return 0
        log.info("resuming after step %d from %s", checkpoint.step, checkpoint.folder)
        return checkpoint.step

    def _take_over(self, checkpoint: Checkpoint) -> None:
        for name, engine in self.task.engines.items():
            with checkpoint.source(name) as source:
                engine.load(source)
        self.task.load_state_dict(checkpoint.state["task"])
        self._prefetcher.load_state_dict(checkpoint.state["loader"])
        counts = checkpoint.state["loop"]
        self._nonfinite, self._nonfinite_in_a_row = counts["nonfinite"], counts["nonfinite_in_a_row"]
        self._saved = checkpoint.step

    def _save(self, step: int) -> None:
        state = self._run_metadata | {
            "task": self.task.state_dict(),
            "loader": self._prefetcher.state_dict(),
            "loop": {"nonfinite": self._nonfinite, "nonfinite_in_a_row": self._nonfinite_in_a_row},
            "metrics": finite(self._last),
        }
        try:
            self.store.save(step, self.task.engines, state)
        except NonFiniteError as error:
            raise self._not_finite(f"{error}") from None
        self._saved = step
        self._to_stop.pause()
        for hook in self.hooks:
            hook.on_save(step)

    def _check_finite(self, step: int, result: StepResult) -> None:
        dropped = [name for name, report in result.reports.items() if not report.applied]
        if not dropped:
            self._nonfinite_in_a_row = 0
            return
        self._nonfinite += 1
        self._nonfinite_in_a_row += 1
        log.warning("step %d: loss or gradient of %s not finite; nothing was updated", step + 1, ", ".join(dropped))
        if self._nonfinite_in_a_row > self.config.max_nonfinite:
            raise self._not_finite(
                f"loss or gradient of {', '.join(dropped)} was not finite in {self._nonfinite_in_a_row} steps in a "
                f"row, the last of them step {step + 1}; the limit is loop.max_nonfinite={self.config.max_nonfinite}"
            )

    def _not_finite(self, what: str) -> NonFiniteError:
        """The end of a run that does not get better by itself, with a way out that the next start accepts."""
        self.store.close()
        keys = "a lower optim.lr, or engine.gradient_clipping, or a longer schedule.warmup_steps"
        if not self._saved:
            return NonFiniteError(f"{what}; {self._what_is_saved()}. Begin again: the same command with {keys}")
        return NonFiniteError(
            f"{what}; {self._what_is_saved()}. Go on from there with a lower learning rate, on the record: the same "
            f"command with resume_from={self._saved} on_change=record and {keys}"
        )

    def _what_is_saved(self) -> str:
        return f"step {self._saved} is saved" if self._saved else "nothing was saved yet"

    def _report(
        self, step: int, metrics: Metrics, message: StepMessage, writer: MetricsWriter | None, bar: Progress
    ) -> Metrics:
        """Add rates, memory and counts, and write the line."""
        used = {name.removeprefix(_MEMORY): value for name, value in message.totals.items() if name.startswith(_MEMORY)}
        metrics |= self._meter.read() | used | self._stragglers.read(message.several["own"])
        metrics["nonfinite_steps"] = float(self._nonfinite)
        if (goodput := self._ledger.goodput) is not None:
            metrics["goodput"] = goodput
        if writer is not None:
            writer.write(step, metrics)
        self._ledger.write(step)
        bar.metrics |= {name: metrics[name] for name in ("loss", "lr") if metrics.get(name) is not None}
        return metrics


def _reported(result: StepResult) -> dict[str, float]:
    """What the engines said about their update, under the engine's name when there are several."""
    metrics = {}
    for name, report in result.reports.items():
        prefix = f"{name}/" if len(result.reports) > 1 else ""
        metrics |= {f"{prefix}lr": report.lr, f"{prefix}grad_norm": report.grad_norm}
    return metrics
