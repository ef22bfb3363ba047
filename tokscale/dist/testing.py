"""Run a function on several real processes: how this project and its users test distributed code on a laptop."""

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from tokscale.dist.comm import Comm
from tokscale.dist.env import detect

_PROGRAM = "import sys; from tokscale.dist.testing import _child; _child(*sys.argv[1:])"


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 300.0) -> list[Any]:
    """Call `function(comm, *arguments)` in `world` fresh CPU processes joined by gloo; return what each returned.

    Fresh interpreters rather than forks or a pool: DeepSpeed keeps process-global state.

    Args:
        function: Importable by module and name.
        world: Number of ranks.
        arguments: Picklable values.
        timeout: Seconds until the whole job is killed.

    Raises:
        RuntimeError: With the output of the first rank that failed.
        TimeoutError: When the ranks do not finish in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder, "arguments.pt"))
        source = Path(sys.modules[function.__module__].__file__ or "").resolve()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(source), function.__module__, function.__qualname__, folder],
                env=_environment(rank, world, folder),
                stdout=open(Path(folder, f"{rank}.log"), "w"),  # noqa: SIM115 - owned by the child
                stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]
        failure = _wait(processes, timeout)
        logs = [Path(folder, f"{rank}.log").read_text() for rank in range(world)]
        if failure is None:
            raise TimeoutError(f"{world} ranks did not finish in {timeout:.0f} s\n" + "\n".join(logs)[-4000:])
        if failure >= 0:
            raise RuntimeError(f"rank {failure} of {world} failed:\n{logs[failure][-6000:]}")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> int | None:
    """Index of the first rank that failed, -1 when all succeeded, None on a timeout."""
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            for rank, code in enumerate(codes):
                if code not in (None, 0):
                    return rank
            if all(code == 0 for code in codes):
                return -1
            time.sleep(0.02)
        return None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _environment(rank: int, world: int, folder: str) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "TOKSCALE_RENDEZVOUS": str(Path(folder, "rendezvous")),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _child(source: str, module: str, name: str, folder: str) -> None:
    env = detect()
    if env.world > 1:  # a file, not a port: tests may run side by side
        torch_dist.init_process_group(
            "gloo", init_method=f"file://{os.environ['TOKSCALE_RENDEZVOUS']}", rank=env.rank, world_size=env.world
        )
    # Test files are not packages; load them from their path under the name their pickles use, and let them import the
    # helpers beside them, as pytest does.
    sys.path.append(str(Path(source).parent))
    if (spec := importlib.util.find_spec(module) if "." in module else None) is None:
        spec = importlib.util.spec_from_file_location(module, source)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module] = loaded
        spec.loader.exec_module(loaded)
    else:
        loaded = importlib.import_module(module)
    target: Any = loaded
    for part in name.split("."):
        target = getattr(target, part)
    arguments = torch.load(Path(folder, "arguments.pt"), weights_only=False)
    result = target(Comm(env), *arguments)
    torch.save(result, Path(folder, f"{env.rank}.pt"))
    if torch_dist.is_initialized():
        torch_dist.barrier()
    # The result is on disk. Taking the group's threads apart can abort a busy process ("terminate called without an
    # active exception"), which would fail a test that has passed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
