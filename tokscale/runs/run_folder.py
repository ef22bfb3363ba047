"""A run's own folder: locked while a job works in it, described, and refused to any other run.

What makes a run the same run: model, optimizer, schedule, precision, batch size, data and seed. What may change from
one start to the next, since the result is the same or the change is the point: the kind of engine and the number of
ranks, the split into micro batches, how long to train, when to save and to report, and where folders lie. Some of the
rest may change on the record, see `segments`.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tokscale.base import log
from tokscale.base.config import encode
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.files import atomic_write, read_json, storage_errors, write_json
from tokscale.base.formats import upgrade
from tokscale.base.strict_yaml import read_yaml
from tokscale.checkpoint.status import newest_step
from tokscale.dist.comm import Comm
from tokscale.runs import segments
from tokscale.runs.arithmetic import keep_dtype, recorded_dtype
from tokscale.runs.environment import environment
from tokscale.runs.lock import FolderLock
from tokscale.runs.outcome import Attempt, RunFolderRefused
from tokscale.runs.restarts import note_start
from tokscale.runs.saved import forget_arithmetic, holds_results, set_unsaved_aside
from tokscale.runs.stage import StageConfig

RESUME_MAY_CHANGE = frozenset(
    {
        "run_dir",
        "deterministic",
        "data_dir",
        "device",
        "image_tokenizer",
        "text_tokenizer",
        "text_encoder",
        "text_encoder_precision",  # the loader's state holds the encoder's fingerprint
        "text_encoder_length",
        "allow_torchscript",
        "data",
        "images",
        "engine",
        "loop",
        "checkpoint",
        "held_out",
        "samples",
        "reconstructions",
        "best",
        "profile",
        "diagnostics",
        "micro_batches",
        "preflight",
        "watchdog",
        "on_change",
        "resume_from",
    }
)
"""First parts of the keys that do not make another run. What of `data` and
`images` matters, the loader's own state guards."""
RESUME_MUST_MATCH = frozenset({"engine.dtype", "engine.gradient_clipping"})
"""Keys below them that do."""
_NEW_KEYS: dict[str, Any] = {"model.rotary_dtype": "fp32", "init_resize": False, "freeze": []}
"""Keys that came after 02310aa with the value that was always taken before; runs of then do not hold them."""
CONFIG_FILE = "config.yaml"
Products = Mapping[str, Path]
"""What a stage makes before its first checkpoint, by the first part of the keys that make it: a folder, whole once it
has `config.json`. While it stands, these keys are kept."""
_NONE: Products = {}
_log = log.logger("runs")


class RunConfigMismatchError(RunFolderRefused, ConfigError):
    """The folder holds what another configuration made."""


@contextmanager
def locked_run_dir(
    folder: Path, stage: str, config: StageConfig, comm: Comm, products: Products = _NONE
) -> Iterator[Path]:
    """A folder that is this job's alone inside the context. Collective.

    Writes `config.yaml` (a recipe that repeats the run: `tokscale <stage> recipe=<folder>/config.yaml`), appends to
    `command.txt`, writes `env.json`, and sends each rank's log to `logs/`. Where an earlier start of another
    configuration saved nothing, the folder is described anew, and what it wrote is set aside.

    Args:
        folder: Made when missing.
        stage: The stage's name.
        config: Its configuration, as decoded.
        comm: The job; only its main rank touches the shared files.
        products: What the stage makes before anything is saved, see `Products`.

    Raises:
        RunFolderInUseError: When a job that still runs holds the lock. The lock of a dead one is free.
        RunConfigMismatchError: Naming the keys that differ.
        EnvironmentRefused: When this job was started several times without making a step.
    """
    lock: FolderLock | None = None
    try:

        def claim() -> None:
            nonlocal lock
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock = FolderLock(folder, comm.env.job)
                changes = refuse_another_run(folder, stage, config, products) | _extension(folder, stage, config)
                segments.record(folder, config, changes)
                if there := recorded_run(folder, stage, config):
                    keep_dtype(folder, there)
                else:
                    _begin_anew(folder, stage, config)
                Attempt(config.run_dir, stage, comm.env).mark()
                note_start(folder)
                _describe(folder, stage, config, comm)

        comm.on_main(f"claiming {folder}", claim)
        log.configure(comm.rank, folder / "logs")
        yield folder
    finally:
        log.configure(comm.rank)
        if lock is not None:
            lock.release()


def update_env_json(folder: Path, comm: Comm, **facts: Any) -> None:
    """Add to a claimed folder's `env.json` what is known only once the model stands."""
    if comm.is_main:
        with storage_errors(folder):
            write_json(folder / "env.json", read_json(folder / "env.json") | facts)


def read_config(folder: Path) -> dict[str, Any]:
    """The sections of a run folder's `config.yaml`, by stage; empty when there is none.

    Raises:
        DataError: When it is damaged.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return {}
    try:
        sections = read_yaml(path, refuse=DataError)
    except DataError as error:
        raise DataError(f"{error}; it is damaged: restore it, or move the folder away") from None
    return upgrade("run", sections)


def recorded_run(folder: Path, stage: str, config: StageConfig) -> dict[str, Any]:
    """What a folder's run was described as; empty where nothing of it was saved, which any run may begin anew."""
    return read_config(folder).get(stage, {}) if holds_results(folder, stage, config.run_dir) else {}


def refuse_another_run(
    folder: Path, stage: str, config: StageConfig, products: Products = _NONE
) -> dict[str, segments.Change]:
    """Check that a folder is empty, holds this very run, or one that saved nothing. Reads only.

    Returns:
        Old and new values of the keys that are changed on the record.

    Raises:
        RunConfigMismatchError: Naming the keys that differ.
        DataError: When the folder's description is damaged.
    """
    sections = read_config(folder)
    if stage not in sections:
        if any(holds_results(folder, name, config.run_dir) for name in sections):
            raise RunConfigMismatchError(
                f"{folder}: holds a run of {', '.join(sections)}, not of {stage}; choose another run_dir"
            )
        return {}
    differing = _differing(folder, sections[stage], config)
    if not holds_results(folder, stage, config.run_dir):
        _refuse_other_products(products, differing)
        return {}
    recordable = bool(differing) and all(segments.is_recordable(key) for key in differing)
    if not differing or (recordable and _on_record(config)):
        return differing
    record = ", or on_change=record to go on with the new values, on the record" if recordable else ""
    raise RunConfigMismatchError(
        f"{folder}: holds a different run: {_shown(differing)}. Choose another run_dir, or set these keys as they "
        f"were{record}"
    )


def _differing(folder: Path, described: Mapping[str, Any], config: StageConfig) -> dict[str, segments.Change]:
    """The keys that make another run of it, with their values there and here."""
    there, here = (_identity(values) for values in (described, encode(config)))
    if "auto" in (here.get("engine.dtype"), there.get("engine.dtype")):
        # `auto` goes on in what is recorded; what is named must be that.
        there["engine.dtype"] = recorded_dtype(folder) or there.get("engine.dtype")
        if here.get("engine.dtype") == "auto" or there["engine.dtype"] == "auto":
            here["engine.dtype"] = there["engine.dtype"]
    return {
        key: (there.get(key), here.get(key))
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and there.get(key, _NEW_KEYS.get(key)) != here.get(key)
    }


def _refuse_other_products(products: Products, differing: Mapping[str, segments.Change]) -> None:
    for first, product in products.items():
        changed = {key: values for key, values in differing.items() if key.partition(".")[0] == first}
        if changed and (product / "config.json").exists():
            raise RunConfigMismatchError(
                f"{product}: was made by another configuration: {_shown(changed)}. Choose another run_dir, or set "
                "these keys as they were"
            )


def _begin_anew(folder: Path, stage: str, config: StageConfig) -> None:
    """Nothing was saved here: leave nothing of an earlier start that would count for this one."""
    sections = read_config(folder)
    differing = _differing(folder, sections[stage], config) if stage in sections else dict.fromkeys(sections, ("", ""))
    forget_arithmetic(folder)
    if not differing:
        return
    aside = set_unsaved_aside(folder)
    left = f"; what the earlier start wrote is in {aside}" if aside else ""
    what = _shown(differing) if stage in sections else f"it was a run of {', '.join(sections)}"
    _log.info("%s: nothing was saved in it, so it is described anew (%s)%s", folder, what, left)


def _shown(differing: Mapping[str, segments.Change]) -> str:
    shown = "; ".join(f"{key} is {old!r} there and {new!r} here" for key, (old, new) in list(differing.items())[:5])
    return shown + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")


def _extension(folder: Path, stage: str, config: StageConfig) -> dict[str, segments.Change]:
    """What making a finished run longer changes.

    Raises:
        RunConfigMismatchError: When it moves the learning rate and nobody asked for that on the record.
    """
    there = recorded_run(folder, stage, config)
    if not there or not isinstance(config, segments.ResumableConfig):
        return {}
    newest = config.resume_from or newest_step(folder / "checkpoints")
    changes = segments.extension(there, encode(config), newest)
    if changes and not _on_record(config):
        (old_steps, new_steps), (old, new) = changes.values()
        raise RunConfigMismatchError(
            f"{folder}: the run is finished, and loop.total_steps={new_steps} in the place of {old_steps} moves the "
            f"learning rate from {old:.4g} to {new:.4g} at step {newest}; on_change=record goes on with that, on the "
            "record (a schedule.final_ratio or optim.lr that fits may be changed with it)"
        )
    return changes


def _on_record(config: StageConfig) -> bool:
    return isinstance(config, segments.ResumableConfig) and config.on_change == "record"


def _identity(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in _flat(values).items()
        if key in RESUME_MUST_MATCH or key.partition(".")[0] not in RESUME_MAY_CHANGE
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _describe(folder: Path, stage: str, config: StageConfig, comm: Comm) -> None:
    with atomic_write(folder / CONFIG_FILE, "w") as file:
        values = {key: value for key, value in encode(config).items() if key not in ("on_change", "resume_from")}
        yaml.safe_dump({stage: values}, file, sort_keys=False, allow_unicode=True)
    with open(folder / "command.txt", "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} world={comm.world}: {shlex.join(sys.argv)}\n")
    write_json(folder / "env.json", environment(comm))
