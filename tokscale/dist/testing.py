"""Run a function on several real processes: how this project and its users test distributed code on a laptop."""

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from tokscale.dist.comm import Comm
from tokscale.dist.env import detect
from tokscale.dist.tree import connect_lazily

_PROGRAM = "import sys; from tokscale.dist.testing import {0}; {0}(*sys.argv[1:])"


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    timeout: float = 300.0,
    fork: bool = False,
    imports: Sequence[str] = (),
) -> list[Any]:
    """Call `function(comm, *arguments)` in `world` fresh CPU processes joined by gloo; return what each returned.

    Fresh interpreters rather than a pool: DeepSpeed keeps process-global state.

    Args:
        function: Importable by module and name.
        world: Number of ranks.
        arguments: Picklable values.
        timeout: Seconds until the whole job is killed.
        fork: Import the function's module once, in a fresh interpreter that then forks. For many small ranks.
        imports: Further modules that it imports before it forks.

    Raises:
        RuntimeError: With the output of the first rank that failed.
        TimeoutError: When the ranks do not finish in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder, "arguments.pt"))
        source = Path(sys.modules[function.__module__].__file__ or "").resolve()
        # A script would start its ranks anew in each of them, were it loaded under the name it has as a program.
        module = source.stem if function.__module__ == "__main__" else function.__module__
        where = (str(source), module, function.__qualname__, folder)
        if fork:
            failure = _wait([_start(_PROGRAM.format("_fork"), *where, str(world), *imports, rank=0, world=world)], timeout)
            failed = Path(folder, "failed")
            failure = int(failed.read_text()) if failed.exists() else failure
        else:
            program = _PROGRAM.format("_child")
            failure = _wait([_start(program, *where, rank=rank, world=world) for rank in range(world)], timeout)
        logs = [path.read_text() if path.exists() else "" for path in (Path(folder, f"{n}.log") for n in range(world))]
        if failure is None:
            raise TimeoutError(f"{world} ranks did not finish in {timeout:.0f} s\n" + "\n".join(logs)[-4000:])
        if failure >= 0:
            raise RuntimeError(f"rank {failure} of {world} failed:\n{logs[failure][-6000:]}")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _start(program: str, *words: str, rank: int, world: int) -> subprocess.Popen[bytes]:
    folder = words[3]
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        # What the caller can import, its children can.
        env=os.environ | _environment(rank, world, folder) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=open(Path(folder, f"{rank}.log"), "a"),  # noqa: SIM115 - owned by the child
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


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
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has forked
            process.wait()


def _environment(rank: int, world: int, folder: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _child(source: str, module: str, name: str, folder: str) -> None:
    _join(folder)
    _call(_load(source, module, name), folder)


def _fork(source: str, module: str, name: str, folder: str, world: str, *imports: str) -> None:
    """Import, fork a process for each rank, and end as the first of them that fails."""
    target = _load(source, module, name)
    for further in imports:
        importlib.import_module(further)
    ranks = {}
    for rank in range(int(world)):
        if (pid := os.fork()) == 0:
            os.environ.update(_environment(rank, int(world), folder))
            log = os.open(Path(folder, f"{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                _join(folder)
                _call(target, folder)
            finally:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        ranks[pid] = rank
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status:
            Path(folder, "failed").write_text(str(rank))
            os._exit(1)


def _join(folder: str) -> None:
    env = detect()
    connect_lazily()
    if env.world > 1:  # a file, not a port: tests may run side by side
        torch_dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=env.rank, world_size=env.world
        )


def _load(source: str, module: str, name: str) -> Callable[..., Any]:
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
    return target


def _call(target: Callable[..., Any], folder: str) -> None:
    env = detect()
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
