"""Who am I: the only reader of RANK, LOCAL_RANK, WORLD_SIZE, SLURM_* and their like."""

import os
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from tokscale.base.errors import EnvironmentRefused
from tokscale.dist.slurm import slurm_step

_BEGAN = time.time()


@dataclass(frozen=True)
class ProcessEnv:
    """This process's place in the job."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0
    nodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """0 means: alone, no rendezvous needed."""
    launcher: str = "none"
    """Which variables told us: `torchrun` (also the `deepspeed` launcher), `slurm`, `mpi` or `none`."""
    job: str = ""
    """The scheduler's job id, empty outside one."""

    @property
    def is_main(self) -> bool:
        """True on the one process that speaks for all."""
        return self.rank == 0


def detect(environ: Mapping[str, str] = os.environ) -> ProcessEnv:
    """Read the launcher's variables: torchrun and deepspeed first, then srun, then mpirun, else a single process.

    Raises:
        EnvironmentRefused: When a launcher's variables are incomplete or contradict each other.
    """
    job = environ.get("SLURM_JOB_ID", "")
    # Our batch files say that srun started us: images of NGC set RANK and WORLD_SIZE themselves, wrongly here.
    if environ.get("TOKSCALE_LAUNCHER") == "srun" and "SLURM_PROCID" in environ:
        return _slurm(environ, job)
    # Inside `salloc` or an sbatch script, outside `srun`, SLURM_NTASKS is set but we are in no step, or a reserved one.
    in_a_step = "SLURM_PROCID" in environ and bool(slurm_step(environ)) and _tasks(environ) > 1
    # A launcher that srun started has more ranks than srun has tasks, or is torchrun. What else names a rank in a step
    # of several tasks is an image's hook, or has leaked in from the shell that started it.
    if "RANK" in environ and "WORLD_SIZE" in environ and not (in_a_step and _is_hook(environ, "WORLD_SIZE")):
        return _torchrun(environ, job)
    if in_a_step and ("OMPI_COMM_WORLD_RANK" not in environ or _is_hook(environ, "OMPI_COMM_WORLD_SIZE")):
        return _slurm(environ, job)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _mpi(environ, job)
    return ProcessEnv(job=job)


def _is_hook(environ: Mapping[str, str], world: str) -> bool:
    return "TORCHELASTIC_RUN_ID" not in environ and _int(environ, world, "1") <= _tasks(environ)


def launch_name(env: ProcessEnv, environ: Mapping[str, str] = os.environ) -> str:
    """What this launch is called, the same on all its ranks and told apart from others as far as launchers allow.

    Under Slurm `<job id>.<restart count>`; of one process alone its time, host and number.
    """
    if env.job:
        return f"{env.job}.{environ.get('SLURM_RESTART_COUNT') or 0}"
    if env.world == 1:
        return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(_BEGAN))}-{socket.gethostname()}-{os.getpid()}"
    again = environ.get("TORCHELASTIC_RESTART_COUNT") or 0
    return f"{env.launcher}-{env.master_addr}-{env.master_port}.{again}"


def export(env: ProcessEnv, environ: dict[str, str] | None = None) -> None:
    """Set the variables that libraries below (torch, DeepSpeed) look for, whatever launcher we came from."""
    target = os.environ if environ is None else environ
    target |= {
        "RANK": str(env.rank),
        "WORLD_SIZE": str(env.world),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.local_world),
        "LOCAL_SIZE": str(env.local_world),
        "CROSS_RANK": str(env.node),
        "CROSS_SIZE": str(env.nodes),
        "MASTER_ADDR": env.master_addr,
        "MASTER_PORT": str(env.master_port),
    }


def _torchrun(environ: Mapping[str, str], job: str) -> ProcessEnv:
    rank, world = _int(environ, "RANK"), _int(environ, "WORLD_SIZE")
    local_world = _int(environ, "LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", str(world)))
    if not 0 <= rank < world:
        raise EnvironmentRefused(f"RANK={rank} does not lie in [0, WORLD_SIZE={world}); check the launcher's variables")
    return ProcessEnv(
        rank=rank,
        world=world,
        local_rank=_int(environ, "LOCAL_RANK", "0"),
        local_world=local_world,
        node=_int(environ, "GROUP_RANK", environ.get("CROSS_RANK", str(rank // max(local_world, 1)))),
        nodes=max(world // max(local_world, 1), 1),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_int(environ, "MASTER_PORT", "29500"),
        launcher="torchrun",
        job=job,
    )


def _slurm(environ: Mapping[str, str], job: str) -> ProcessEnv:
    world, nodes = _tasks(environ), _int(environ, "SLURM_NNODES", "1")
    return ProcessEnv(
        rank=_int(environ, "SLURM_PROCID"),
        world=world,
        local_rank=_int(environ, "SLURM_LOCALID"),
        local_world=_tasks_here(environ, default=world // nodes),
        node=_int(environ, "SLURM_NODEID", "0"),
        nodes=nodes,
        master_addr=_master_addr(environ, nodes),
        master_port=_int(environ, "TOKSCALE_MASTER_PORT", environ.get("MASTER_PORT") or str(rendezvous_port(environ))),
        launcher="slurm",
        job=job,
    )


def rendezvous_port(environ: Mapping[str, str]) -> int:
    """A port for a step of a job: below the range that the kernel takes for connections (32768 on), and another one
    for each task of an array, each start of a job and each step, since a dead one may hold its port for a while.
    """
    job, restart = _int(environ, "SLURM_JOB_ID", "0"), _int(environ, "SLURM_RESTART_COUNT", "0")
    step = _int(environ, "SLURM_STEP_ID", "0")
    return 12000 + (job * 31 + restart * 7 + step) % 20000


def _master_addr(environ: Mapping[str, str], nodes: int) -> str:
    asked = environ.get("TOKSCALE_MASTER_ADDR")  # by our batch file, outside of the container
    if asked:
        return asked
    given = environ.get("MASTER_ADDR", "")
    if nodes > 1 and (given == "localhost" or given.startswith("127.")):
        raise EnvironmentRefused(
            f"MASTER_ADDR={given} means another machine on each of the {nodes} nodes; unset it, or set it to the first"
        )
    return given or _first_host(environ)


def _mpi(environ: Mapping[str, str], job: str) -> ProcessEnv:
    world, local_world = _int(environ, "OMPI_COMM_WORLD_SIZE"), _int(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    rank = _int(environ, "OMPI_COMM_WORLD_RANK")
    if world > local_world and "MASTER_ADDR" not in environ:
        raise EnvironmentRefused("mpirun over several hosts needs MASTER_ADDR: mpirun -x MASTER_ADDR=<first host> ...")
    return ProcessEnv(
        rank=rank,
        world=world,
        local_rank=_int(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world=local_world,
        node=rank // local_world,
        nodes=world // local_world,
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_int(environ, "MASTER_PORT", "29500"),
        launcher="mpi",
        job=job,
    )


def _tasks(environ: Mapping[str, str]) -> int:
    # Of the step, where Slurm says so: an inherited SLURM_NTASKS may be that of the whole job.
    return _int(environ, "SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))


def _tasks_here(environ: Mapping[str, str], default: int) -> int:
    # SLURM_TASKS_PER_NODE reads "8(x2),4": eight tasks on each of two nodes, then four.
    counts: list[int] = []
    for part in environ.get("SLURM_TASKS_PER_NODE", "").split(","):
        count, _, repeat = part.partition("(x")
        if count:
            counts += [int(count)] * int(repeat.rstrip(")") or 1)
    node = _int(environ, "SLURM_NODEID", "0")
    return counts[node] if node < len(counts) else default


def _first_host(environ: Mapping[str, str]) -> str:
    if _int(environ, "SLURM_NNODES", "1") == 1:
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentRefused(
            f"cannot expand the node list {nodes!r} with scontrol ({error}); set MASTER_ADDR to the first host"
        ) from error
    host = listing.stdout.split()[0]
    # Several slurmd on one machine have node names that no resolver knows.
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return _node_address(host)
    return host


def _node_address(host: str) -> str:
    listing = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=30)
    for word in listing.stdout.split():
        if word.startswith("NodeAddr="):
            return word.removeprefix("NodeAddr=")
    raise EnvironmentRefused(f"cannot resolve the first node {host!r}; set MASTER_ADDR to its address")


def _int(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = environ.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise EnvironmentRefused(
            f"environment variable {name}={value!r} is not a number; the launcher sets it"
        ) from None
