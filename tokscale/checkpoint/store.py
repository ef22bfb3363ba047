"""The checkpoints of one run: save, find the newest that can be trusted, keep no more than wanted."""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokscale.base.errors import CheckpointError, NonFiniteError
from tokscale.base.log import logger
from tokscale.base.state import Persistent, TensorShard
from tokscale.checkpoint import commit
from tokscale.checkpoint.asyncsave import AsyncSave, HostCopy
from tokscale.checkpoint.audit import audit_checkpoint
from tokscale.checkpoint.config import HASHED, CheckpointConfig
from tokscale.checkpoint.disk import Disk, refusals
from tokscale.checkpoint.manifest import INDEX, STATE, Manifest, read_checkpoint_manifest
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.retention import prune
from tokscale.checkpoint.soundness import first_not_finite
from tokscale.checkpoint.status import newest_step
from tokscale.checkpoint.verify import check_belongs, check_hashes, check_sizes, read_small
from tokscale.checkpoint.writer import check_engine_name, write_share
from tokscale.dist.comm import Comm

_log = logger("checkpoint")


class CheckpointStore:
    """The folder `checkpoints/` of a run.

    What saves, waits or searches is collective: call it on all ranks, in the same order. A store may be used as a
    context manager; leaving it waits for a save under way.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig, comm: Comm, disk: Disk | None = None):
        """Nothing is read or written yet. Collective when saves are asynchronous: their threads get their own line.

        Args:
            folder: Shared by all ranks; created by the first save.
            config: How to save and keep.
            comm: The job.
            disk: The file system; tests pass one that fails.
        """
        self.folder = Path(folder)
        self.config = config
        self._comm = comm
        self._disk = disk or Disk()
        self._host = HostCopy()
        self._saving: AsyncSave | None = None
        self.seconds = 0.0
        """How long the last save took to be written, beside training or not; 0 before the first."""
        self._rejected: set[int] = set()
        """Steps whose checkpoints passed the checks of their files, but could not be loaded."""
        # The background thread's messages must not mix with those of the training thread.
        self._channel = comm.duplicate_group() if config.async_save else comm

    # ------------------------------------------------------------------------------------------------ saving

    def due(self, step: int) -> bool:
        """Whether `every_steps` asks for a save after `step` updates."""
        return step % self.config.every_steps == 0

    def save(self, step: int, engines: Mapping[str, Persistent], state: Mapping[str, Any]) -> Path | None:
        """Save all engines. At most one save is in flight: an earlier one is waited for, and its failure raised here.

        Args:
            step: Optimizer updates done so far.
            engines: By name.
            state: JSON-ready and equal on all ranks: loader position, task, configuration, fingerprints.

        Returns:
            The committed folder; None while it is being written in the background (see `poll`).

        Raises:
            NonFiniteError: When a weight, moment or average is not finite; nothing is saved then.
            StorageError: When the file system refuses. Earlier checkpoints are intact.
            CheckpointError: When the ranks' shards do not tile the tensors.
        """
        self.wait()
        if (found := first_not_finite(engines, self._comm)) is not None:
            raise NonFiniteError(f"{found} is not finite after step {step}, so that step was not saved")
        pending = self._begin(step, engines, state)
        if pending is None:
            _log.info("step %d is already saved", step)
            return self.folder / commit.folder_name(step)
        if not self.config.async_save:
            shards = {name: list(engine.shards()) for name, engine in engines.items()}
            return self._write(pending, shards, self._comm)
        copies = {name: self._host.copy(name, engine.shards()) for name, engine in engines.items()}
        self._saving = AsyncSave(step, lambda: self._write(pending, copies, self._channel))
        return None

    def poll(self) -> Path | None:
        """Call at every step boundary: the checkpoint that a background save committed since the last call.

        Costs one small message while a save is in flight, and nothing otherwise.

        Raises:
            TokscaleError: When the background save failed, on any rank; raised on all.
        """
        if self._saving is None or self._comm.max(0.0 if self._saving.done() else 1.0):
            return None
        return self.wait()

    @property
    def saving(self) -> bool:
        """Whether this rank's part of a background save is still being written. When no rank's is, `poll` ends it."""
        return self._saving is not None and not self._saving.done()

    def wait(self) -> Path | None:
        """Wait for a save in flight; its folder, or None when there was none.

        Raises:
            TokscaleError: As `poll`.
        """
        if self._saving is None:
            return None
        save, self._saving = self._saving, None
        with self._comm.raise_together(f"saving step {save.step}"):
            return save.result()

    def close(self) -> None:
        """Finish; as `wait`. A process that ends without it may leave a save uncommitted, which then does not count."""
        self.wait()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        save, self._saving = self._saving, None
        if save is not None:
            # After a failure of one rank the others may never come to agree on anything. But the threads that write
            # have a line of their own, so the save can still be finished, and the failure that is under way goes on.
            try:
                _log.info("finished %s before leaving", save.result())
            except Exception as error:
                _log.error("the save of step %d, under way, is lost: %s", save.step, error)

    def _begin(self, step: int, engines: Mapping[str, Persistent], state: Mapping[str, Any]) -> commit.Pending | None:
        """Agree on a new save; None when the step is already saved and sound."""
        final = self.folder / commit.folder_name(step)
        with self._comm.raise_together(f"saving step {step}"), refusals(self.folder):
            for name in engines:
                check_engine_name(name)
            encoded = json.dumps(state).encode()
            scalars = {name: json.loads(json.dumps(engine.scalars())) for name, engine in engines.items()}
            there = False
            if self._comm.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                commit.sweep(self._disk, self.folder)
                there = final.exists()
        there = self._comm.broadcast_object(there) and step not in self._rejected
        if there and self._look(final)[1] is None:
            return None

        def agree() -> tuple[str, str]:
            with refusals(self.folder):
                return secrets.token_hex(8), commit.run_id(self._disk, self.folder)

        save_id, run = self._comm.on_main(f"saving step {step}", agree)
        return commit.Pending(self.folder, step, save_id, run, encoded, scalars)

    def _write(self, pending: commit.Pending, shards: Mapping[str, list[TensorShard]], comm: Comm) -> Path:
        what, disk, began = f"saving step {pending.step}", self._disk, time.monotonic()
        try:
            with comm.raise_together(what), refusals(pending.temporary):
                disk.make_folder(pending.temporary)
                mine: commit.Share = {
                    name: write_share(disk, pending.temporary, name, comm.rank, share, pending.id)
                    for name, share in shards.items()
                }
            comm.decide(what, mine, lambda shares: self._finish(pending, shares))
        except BaseException:
            if comm.is_main:
                commit.discard(disk, pending.temporary)
            raise
        if comm.is_main:
            commit.point_latest(disk, pending)
            prune(disk, self.folder, self.config, self._rejected)
            _log.info("saved %s", pending.final)
        self.seconds = time.monotonic() - began
        return pending.final

    def _finish(self, pending: commit.Pending, shares: Sequence[commit.Share]) -> None:
        with refusals(pending.temporary):
            commit.finish(self._disk, pending, shares)

    # ----------------------------------------------------------------------------------------------- finding

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files pass `config.verify`; None when the run has none yet. See `resume`.

        Damaged ones are passed over, loudly.

        Raises:
            CheckpointError: When there are checkpoints and none can be read: training must not silently start anew.
        """
        return self.resume({}, lambda checkpoint: None, audited=False)

    def resume(
        self, engines: Mapping[str, Persistent], load: Callable[[Checkpoint], None], *, audited: bool = True
    ) -> Checkpoint | None:
        """Load the newest checkpoint that can be trusted: its files are whole, and so are the values in them.

        What is read is hashed meanwhile, and must be finite; otherwise the next older one is loaded over it, loudly.

        Args:
            engines: Filled by `load`.
            load: Takes a checkpoint's whole state over. Collective.
            audited: False to go by `config.verify` before loading alone.

        Returns:
            The one that was loaded; None when the run has none yet.

        Raises:
            CheckpointError: When there are checkpoints and none can be used: training must not silently start anew.
                Or what `load` raised about a checkpoint that is not damaged.
        """
        candidates = self._folders()[::-1]
        problems = []
        for folder in candidates:
            checkpoint, problem = self._open(folder)
            if checkpoint is not None:
                problem = self._load(checkpoint, engines, load, audited and HASHED[self.config.verify].loading)
                if problem is None:
                    if problems and self._comm.is_main:
                        _log.error("FALLING BACK to %s; newer checkpoints cannot be used", folder)
                    return checkpoint
                self._rejected.add(checkpoint.step)
            problems.append(str(problem))
            if self._comm.is_main:
                _log.error("checkpoint cannot be used: %s", problem)
        if problems:
            raise CheckpointError(
                f"{self.folder}: none of its {len(problems)} checkpoints can be used:\n  "
                + "\n  ".join(problems)
                + "\nRestore one from a backup, or move the folder away to start from scratch"
            )
        if not self._empty(candidates):
            latest = self.folder / commit.LATEST
            raise CheckpointError(
                f"{latest} exists, but no checkpoint does: they were deleted or moved. "
                "Restore one, or delete the folder to start from scratch"
            )
        return None

    def _open(self, folder: Path) -> tuple[Checkpoint | None, str | None]:
        manifest, problem = self._look(folder)
        if manifest is None or problem is not None:
            return None, problem
        small = self._comm.on_main(
            f"opening {folder}", lambda: {name: read_small(folder, manifest, name) for name in (INDEX, STATE)}
        )
        return Checkpoint(folder, manifest, small), None

    def _load(
        self,
        checkpoint: Checkpoint,
        engines: Mapping[str, Persistent],
        load: Callable[[Checkpoint], None],
        audited: bool,
    ) -> str | None:
        """Why a checkpoint cannot be used, found while loading; equal on all ranks."""
        audit = audit_checkpoint(checkpoint, None, self._comm) if audited else None
        failure: CheckpointError | None = None
        try:
            load(checkpoint)
        except CheckpointError as error:
            failure = error
        if audit is not None and (damage := audit.problem()) is not None:
            return damage
        if failure is not None:
            raise failure
        found = first_not_finite(engines, self._comm) if engines else None
        return found and f"{checkpoint.folder}: {found} is not finite"

    def empty(self) -> bool:
        """Whether this run has saved nothing yet, damaged or not: only then may it begin from other weights."""
        return self._empty(self._folders())

    def _empty(self, folders: Sequence[Path]) -> bool:
        return not folders and not self._comm.on_main(
            f"looking into {self.folder}", lambda: (self.folder / commit.LATEST).exists()
        )

    def _folders(self) -> list[Path]:
        """Oldest first. One rank looks."""
        return self._comm.on_main(f"looking into {self.folder}", lambda: commit.checkpoint_folders(self.folder))

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step, if it passes `config.verify`.

        Raises:
            CheckpointError: When it is not there or cannot be used.
        """
        folder = self.folder / commit.folder_name(step)
        there = [commit.step_of(path) for path in self._folders()]
        if step not in there:
            raise CheckpointError(f"{folder}: no such checkpoint; there are steps {there or 'none'}")
        checkpoint, problem = self._open(folder)
        if checkpoint is None:
            raise CheckpointError(str(problem))
        return checkpoint

    def holds(self, step: int) -> bool:
        """Whether the newest checkpoint is one of this step or a later one, and its files pass `config.verify`."""
        newest = self._comm.on_main(f"looking into {self.folder}", lambda: newest_step(self.folder))
        return newest >= max(step, 1) and self._look(self.folder / commit.folder_name(newest))[1] is None

    def _look(self, folder: Path) -> tuple[Manifest | None, str | None]:
        """A checkpoint's manifest, and why it cannot be used, equal on all ranks. Ranks share the reading."""
        manifest, problem = self._comm.on_main(f"looking at {folder}", lambda: self._cheap_checks(folder))
        if manifest is None or problem is not None:
            return manifest, problem
        mine = sorted(manifest.files)[self._comm.rank :: self._comm.world]
        problem = _first_problem(lambda: check_sizes(folder, manifest, mine))
        problem = problem or _first_problem(lambda: check_belongs(folder, manifest, mine))
        if problem is None and HASHED[self.config.verify].before:
            problem = _first_problem(lambda: check_hashes(folder, manifest, mine))
        return manifest, self._comm.first(problem)

    def _cheap_checks(self, folder: Path) -> tuple[Manifest | None, str | None]:
        try:
            manifest = read_checkpoint_manifest(folder)
        except CheckpointError as error:
            return None, str(error)
        run = commit.read_run_id(self.folder)
        if run is not None and manifest.run != run:
            return None, f"{folder}: belongs to another run ({manifest.run}, this one is {run})"
        if manifest.step != commit.step_of(folder):
            return None, f"{folder}: holds step {manifest.step}; it was renamed"
        if manifest.sound is False:
            return None, f"{folder}: was saved with values that are not finite"
        return manifest, None


def _first_problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return None
