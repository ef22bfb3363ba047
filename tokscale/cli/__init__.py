"""The command line: `tokscale <stage> key=value ...`. Only here, in `compose`, is Hydra known.

Hydra composes the files of `configs/`; what follows is ours: a plain mapping, decoded strictly into the stage's
configuration, so that no key is ignored and nothing below sees an OmegaConf object.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokscale import __version__
from tokscale.base import log
from tokscale.base.config import PathKey, decode
from tokscale.base.errors import EnvironmentRefused, TokscaleError
from tokscale.base.files import storage_errors
from tokscale.base.trust import allow_torchscript
from tokscale.cli.completion import script
from tokscale.cli.failures import explain, keep_traceback, understood
from tokscale.cli.help import overview, report, usage
from tokscale.cli.values import unquoted
from tokscale.cli.ways_out import completed
from tokscale.dist.env import ProcessEnv, detect
from tokscale.dist.slurm import note_joined, time_limit
from tokscale.runs.clock import StageClock
from tokscale.runs.lock import RunFolderInUseError
from tokscale.runs.outcome import Attempt, RunFolderRefused, record_folder
from tokscale.runs.stage import StageConfig
from tokscale.stages import registry

_RUN_DIR = Path(StageConfig.model_fields["run_dir"].default)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; the exit code of `base.errors`, 0 when all is done."""
    argv = without_local_rank(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    run = _Run()
    try:
        run.stage(argv[0], argv[1:])
        return 0
    except BaseException as error:
        code = run.failed(error)
    if run.env.world > 1:
        # A failing rank must not wait for the others in the teardown of a process group that they still use.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class _Run:
    """What is known so far, for the report of a failure at any point."""

    def __init__(self):
        self.env = ProcessEnv()
        self.name = ""
        self.typed: Sequence[str] = ()
        self.attempt: Attempt | None = None
        self.clock: StageClock | None = None

    def stage(self, name: str, overrides: Sequence[str]) -> None:
        if name == "completion":
            self.name = name
            print(script(*(overrides or ["nothing"])[:1]))
            return
        stage = registry.find(name)
        self.name, self.typed = stage.name, overrides
        if any(word in ("-h", "--help") for word in overrides):
            print(usage(stage, overrides))
            return
        self.env = detect()
        log.configure(self.env.rank)
        if stage.writes_exit_json:  # composing may fail before the folder is known from elsewhere
            typed = dict(word.split("=", 1) for word in overrides if word.startswith(("run_dir=", "out=")))
            self._begin(typed.get("run_dir"), typed.get("out"))
        values = _compose(stage, overrides)
        if stage.writes_exit_json:
            self._begin(values.get("run_dir", _RUN_DIR), values.get("out"))
        attempt = self.attempt
        if attempt is not None and attempt.is_kept and self.env.is_main:
            self.clock = StageClock(attempt.run_dir, stage.name, record=attempt.path)
        module = registry.import_stage(stage)
        config = decode(registry.config_class(stage, values), values)
        if self.env.world == 1:
            note_joined()  # the others are said to be there by the process group
        trusted = allow_torchscript(config.allow_torchscript)
        with storage_errors(config.run_dir), time_limit(stage.name), trusted:
            result = module.run(config, self.env)
        if self.env.is_main:
            if attempt is not None:
                attempt.succeed(result, clock=self.clock)
            print(report(stage.name, result, overrides), file=sys.stderr if result.stdout_taken else sys.stdout)

    def _begin(self, typed: Any, typed_out: Any) -> None:
        if typed is None or "${" in f"{typed}{typed_out}":
            return
        run_dir, out = _path("run_dir", typed), None if typed_out is None else _path("out", typed_out)
        run_dir = record_folder(run_dir, out)
        if self.attempt is not None and run_dir == self.attempt.run_dir:
            return
        self.attempt = Attempt(run_dir, self.name, self.env)
        if self.env.is_main:
            self.attempt.begin()

    def failed(self, error: BaseException) -> int:
        code, message = explain(error)
        message = self._with_commands(message)
        where = f"tokscale {self.name}".rstrip() + (f" [rank {self.env.rank}]" if self.env.world > 1 else "")
        refused = isinstance(error, RunFolderRefused)
        kept = keep_traceback(error, self.attempt.run_dir if self.attempt and not refused else None, self.env.rank)
        if os.environ.get("TOKSCALE_DEBUG"):
            traceback.print_exception(error, file=sys.stderr)
        elif code == 1 and not isinstance(error, SystemExit):
            message += f"; the traceback is in {kept}" if kept else "; TOKSCALE_DEBUG=1 in the environment shows where"
        print(f"{where}: {message}", file=sys.stderr)
        with suppress(OSError, TokscaleError):  # what is left behind may fail as the stage did
            self._leave_behind(code, error)
        return code

    def _with_commands(self, message: str) -> str:
        try:
            return completed(message, self.name, self.typed)
        except ValueError:  # quotes in it that no shell could read
            return message

    def _leave_behind(self, code: int, error: BaseException) -> None:
        if self.attempt is not None and isinstance(error, RunFolderRefused):
            # Whoever works there has taken away what was before, and its own end must not find it.
            self.attempt.refused(error, give_back=not isinstance(error, RunFolderInUseError))
            if self.clock is not None:
                self.clock.forget()
        elif self.attempt is not None:
            self.attempt.fail(code, understood(error), create=self.env.world > 1)
            if self.clock is not None:
                self.clock.stop()


def _path(key: str, typed: Any) -> Path:
    path: Path = decode(PathKey, unquoted(typed) if isinstance(typed, str) else typed, where=key)
    return path


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Drop what launchers append: `--local_rank=N`, `--local-rank N`. Ranks come from the environment."""
    kept: list[str] = []
    skip = False
    for word in arguments:
        if skip:
            skip = False
        elif word in ("--local_rank", "--local-rank"):
            skip = True
        elif not re.match(r"--local[_-]rank=", word):
            kept.append(word)
    return kept


def _compose(stage: registry.Stage, overrides: Sequence[str]) -> dict[str, Any]:
    try:  # a quarter of a second that help need not wait for
        from tokscale.cli.compose import compose, compose_pipeline
    except ImportError as error:
        raise EnvironmentRefused(f"{error}; stages need the training extra: pip install 'tokscale[train]'") from None
    return compose_pipeline(stage, overrides) if stage.takes_all_sections else compose(stage, overrides)
