"""What went wrong, for a person and for a scheduler: one sentence and one exit code, whatever was raised.

Where a failure is understood it is raised as one of `base.errors`, with the way out. What is below is the net under all
stages: kinds of failure that a machine, a file or an installation causes keep their codes wherever they come up. Only
what is left is a defect of this program, and ends with 1. The traceback of every failure goes to the run's log.
"""

import os
import pickle
import re
import tarfile
import traceback
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from tokscale.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentRefused,
    StorageError,
    TokscaleError,
)

_LONGEST = 4000
"""Characters of a message on the terminal."""
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can.t allocate memory|cannot allocate memory", re.IGNORECASE)
_EXTRAS = {
    "deepspeed": "train",
    "hydra": "train",
    "matplotlib": "train",
    "tensorboard": "train",
    "webdataset": "train",
    "simplejpeg": "train",
    "transformers": "text-encoder",
    "pyarrow": "parquet",
    "diffusers": "diffusers",
    "natten": "natten",
}
_INTERRUPTED = 130


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence of a failure.

    Args:
        error: Whatever a stage, or what comes before it, has raised.
    """
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, "interrupted"
    if isinstance(error, SystemExit):
        return (error.code, f"ended with {error.code}") if isinstance(error.code, int) else (1, str(error.code))
    known = error if isinstance(error, TokscaleError) else _known(error)
    if known is not None:
        return known.exit_code, _cut(str(known))
    return 1, _cut(f"{type(error).__name__}: {error} (a defect of tokscale, please report it)")


def _known(error: BaseException) -> TokscaleError | None:
    """A failure that a machine, a file or an installation causes, as one of the family."""
    reason = " ".join(str(error).split()) or type(error).__name__
    match error:
        case MemoryError():
            return EnvironmentRefused(f"out of memory ({reason}); make the batch, the model or its pictures smaller")
        case RuntimeError() if _NO_MEMORY.search(reason):
            return EnvironmentRefused(f"{reason}; make the batch, the model or its pictures smaller")
        case ImportError(name=str(name)) if not name.startswith("tokscale"):
            extra = _EXTRAS.get(name.partition(".")[0])
            way_out = f"pip install 'tokscale[{extra}]'" if extra else f"install {name.partition('.')[0]}"
            return EnvironmentRefused(f"{reason}; {way_out}")
        case ConnectionError() | TimeoutError():
            return EnvironmentRefused(f"{reason}; another process or machine cannot be reached: look at its log")
        case OSError(errno=int(number)) if number > 0:
            where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
            return StorageError(f"{where}: {os.strerror(number)}" if where else reason)
        case ValidationError():
            return ConfigError(reason)
        case zipfile.BadZipFile() | tarfile.TarError() | zlib.error() | pickle.UnpicklingError() | EOFError():
            return DataError(f"{reason}; a file is damaged or is not what its name says")
        case UnicodeError() | OSError():  # of the latter those without a number are Pillow's
            return DataError(f"{reason}; a file is damaged or is not what its name says")
    if type(error).__name__ == "SafetensorError":
        return CheckpointError(f"{reason}; a file is damaged")
    return None


def keep_traceback(error: BaseException, run_dir: Path | None, rank: int) -> Path | None:
    """Append where a failure came from to the log of a run folder that is there; where it is now, if anywhere."""
    if run_dir is None or isinstance(error, KeyboardInterrupt | SystemExit):
        return None
    path = run_dir / "logs" / f"rank_{rank:04d}.log"
    with suppress(OSError, ValueError):  # the disk may be what failed
        if run_dir.is_dir():
            path.parent.mkdir(exist_ok=True)
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(traceback.format_exception(error))
            return path
    return None


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
