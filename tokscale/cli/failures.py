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
    PeerLostError,
    StorageError,
    TokscaleError,
)
from tokscale.base.files import way_out
from tokscale.dist.slurm import NodesRefusedError, node_name

_LONGEST = 4000
"""Characters of a message on the terminal."""
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can.t allocate memory|cannot allocate memory", re.IGNORECASE)
_NO_PORT = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_NO_PEER = re.compile(
    r"connection (closed|reset|refused|was|timed out)|broken pipe|gloo/transport|no route to host|"
    r"timed out waiting \d+ ?ms|socket timeout|recvValue failed|failed to recv|connectFullMesh|"
    r"nccl (communicator was aborted|error)|ncclremoteerror|ncclsystemerror|watchdog caught collective",
    re.IGNORECASE,
)
"""How gloo, NCCL and the store say that they have nobody to talk to."""
_OF_RANKS = ("DistBackendError", "DistNetworkError", "DistStoreError")
"""torch's classes for it, whatever they say."""
_BROKEN_DEVICE = re.compile(
    r"uncorrectable (ECC|NVLink)|cudaErrorECCUncorrectable|cudaErrorNvlinkUncorrectable|fallen off the bus|GPU is lost|"
    r"hardware stack error|HIP error: .*(ECC|hardware)",
    re.IGNORECASE,
)
"""How CUDA says that it is the machine."""
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
    known = understood(error)
    if isinstance(known, TokscaleError):
        return known.exit_code, _cut(str(known))
    return 1, _cut(f"{type(error).__name__}: {error} (a defect of tokscale, please report it)")


def understood(error: BaseException) -> BaseException:
    """The failure as one of the family of `base.errors`, where it is one; otherwise as it is."""
    return error if isinstance(error, TokscaleError) else (_known(error) or error)


def _known(error: BaseException) -> TokscaleError | None:
    """A failure that a machine, a file or an installation causes, as one of the family."""
    reason = " ".join(str(error).split()) or type(error).__name__
    match error:
        case MemoryError():
            return EnvironmentRefused(f"out of memory ({reason}); make the batch, the model or its images smaller")
        case RuntimeError() if _NO_MEMORY.search(reason):
            return EnvironmentRefused(f"{reason}; make the batch, the model or its images smaller")
        case RuntimeError() if _BROKEN_DEVICE.search(reason):
            return NodesRefusedError(
                f"a GPU of {node_name()} is broken: {_cut(reason, 300)}; drain the node, `nvidia-smi -q` says more. On "
                "others the same command goes on from the newest checkpoint",
                (node_name(),),
            )
        case RuntimeError() if _NO_PORT.search(reason):
            return EnvironmentRefused(f"{_cut(reason, 300)}; another job has that port: set MASTER_PORT to a free one")
        case RuntimeError() if _NO_PEER.search(reason) or type(error).__name__ in _OF_RANKS:
            return PeerLostError(
                f"another rank is gone: it failed, was killed, or its machine did ({_cut(reason, 300)}). Its own log "
                "in run_dir/logs says more; the same command goes on from the newest checkpoint"
            )
        case ImportError(name=str(name)) if not name.startswith("tokscale"):
            extra = _EXTRAS.get(name.partition(".")[0])
            install = f"pip install 'tokscale[{extra}]'" if extra else f"install {name.partition('.')[0]}"
            return EnvironmentRefused(f"{reason}; {install}")
        case BrokenPipeError():
            return StorageError("whoever read the output has closed it")
        case ConnectionError() | TimeoutError():
            return EnvironmentRefused(f"{reason}; another process or machine cannot be reached: look at its log")
        case OSError(errno=int(number)) if number > 0:
            where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
            advice = f"; {way_out(number)}, then run the same command again" if way_out(number) else ""
            return StorageError((f"{where}: {os.strerror(number)}" if where else reason) + advice)
        case ValidationError():
            return ConfigError(reason)
        case zipfile.BadZipFile() | tarfile.TarError() | zlib.error() | pickle.UnpicklingError() | EOFError():
            return DataError(f"{reason}; a file is damaged or is not what its name says")
        case UnicodeError() | OSError():  # of the latter those without a number are Pillow's
            return DataError(f"{reason}; a file is damaged or is not what its name says")
        case _:
            pass
    if type(error).__name__ == "SafetensorError":
        return CheckpointError(f"{reason}; a file is damaged")
    if type(error).__name__ == "PanicException":  # of a library in Rust, whose rules come out of files
        return DataError(f"{reason}; a tokenizer's file is damaged, or its rules cannot bear this text: make it again")
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


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"
