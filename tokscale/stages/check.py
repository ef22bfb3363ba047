"""`tokscale check`: what a cluster gives a job, looked at from inside; and `tokscale submit action=check`, which asks.

On the nodes: devices, interfaces, the folder that all share, its locks, clocks. From outside: whether `sbatch` takes
each stage, then one job of a minute on each partition that the stages name.
"""

import fcntl
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from tokscale.base.config import PathKey
from tokscale.base.errors import EnvironmentRefused
from tokscale.base.files import new_folder, read_json, write_json
from tokscale.base.log import logger
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.interfaces import refuse_unreachable
from tokscale.dist.slurm import NodesRefusedError, job_states, node_name
from tokscale.runs.environment import environment
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages.cluster import WITHOUT_GPU, ClusterConfig
from tokscale.stages.sbatch import output_flag, sbatch_environ, shell_settings

if TYPE_CHECKING:
    from tokscale.stages.submit import Call

NAME = "check"
_SKEW_SECONDS = 5.0
_POLL_SECONDS = 1.0
_REPLACED = ("--time", "--nodes", "--ntasks", "--exclusive", "--mem", "--array", "--signal", "--job-name", "--output")
log = logger("stages")


class CheckConfig(StageConfig):
    """Keys of the `check` stage."""

    out: PathKey = Path("check")
    """Folder that all nodes must see; gets `report.json`."""
    gpus: int = Field(default=0, ge=0)
    """How many GPUs each task should see."""


CONFIG = CheckConfig


@dataclass(frozen=True)
class NodeReport:
    """One task's view of its machine."""

    node: str
    host: str
    gpus: int
    interfaces: tuple[str, ...]
    interface: str
    """The one that gloo was told to use; empty when none."""
    locks: bool
    """Whether the shared folder knows file locks."""
    clock: float
    """This machine's clock minus the file server's, in seconds."""
    problems: tuple[str, ...]


def run(config: CheckConfig, env: ProcessEnv) -> StageResult:
    """Look at this job's nodes. Collective: that the ranks meet at all is the check of the network.

    Raises:
        EnvironmentRefused: Naming each problem and its node.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    own = _look(config, env)
    try:
        refuse_unreachable(env)
    except NodesRefusedError as error:
        if env.is_main:
            apart = replace(own, problems=(*own.problems, str(error)))
            write_json(config.out / "report.json", {"nodes": [asdict(apart)]})
        raise
    comm = Comm(env)
    reports = comm.gather_objects(own)
    if env.is_main:
        write_json(config.out / "report.json", {"env": environment(comm), "nodes": [asdict(r) for r in reports]})
    comm.close()
    problems = [f"node {report.node}: {problem}" for report in reports for problem in report.problems]
    if problems:
        raise EnvironmentRefused("\n".join(problems))
    return StageResult(f"{len(reports)} task(s) on {', '.join(report.node for report in reports)}: all well")


def check(cluster: ClusterConfig, made: Sequence["Call"], run_dir: Path, minutes: float) -> StageResult:
    """Ask the scheduler about each stage, and look at each partition from inside.

    Raises:
        EnvironmentRefused: Naming all that is wrong, each with what to change.
    """
    lines, problems = [], []
    for call in made:
        told = _sbatch("--test-only", *call.flags, str(call.file))
        if told.returncode == 0:
            lines.append(f"{call.name}: sbatch takes it")
        else:
            problems.append(f"{call.name}: {told.stderr.strip()}\n  sbatch {shlex.join(call.flags)}")
    folder = new_folder((run_dir / NAME / time.strftime("%Y%m%d_%H%M%S")).absolute())
    queued = dict(_look_from_inside(cluster, made, folder))
    for where, job in queued.items():
        if isinstance(job, str):
            problems += [f"{where}: {job}"]
    running = {where: job for where, job in queued.items() if not isinstance(job, str)}
    _wait([str(job) for job in running.values()], minutes)
    states = job_states([str(job) for job in running.values()])
    for where, job in running.items():
        report, state = folder / where / "report.json", states[str(job)]
        if not state.over:
            subprocess.run(["scancel", str(job)], capture_output=True)
            problems.append(f"{where}: job {job} is {state.state} ({state.reason}) after {minutes:g} minutes")
        elif not report.exists():
            left = folder / "state" / f"{job}.why"
            why = f" ({left.read_text().strip()})" if left.is_file() else ""
            problems.append(
                f"{where}: job {job} ended {state.state} without a report{why}; look at {folder}/{where}.log"
            )
        else:
            for node in read_json(report)["nodes"]:
                problems += [f"{where}: node {node['node']}: {problem}" for problem in node["problems"]]
                lines.append(f"{where}: {node['node']} has {node['gpus']} GPU(s), {', '.join(node['interfaces'])}")
    if problems:
        raise EnvironmentRefused("\n".join(["this cluster would not do:", *problems]))
    return StageResult("\n".join(["all well", *lines]), {"reports": folder})


def _look_from_inside(cluster: ClusterConfig, made: Sequence["Call"], folder: Path) -> Iterator[tuple[str, int | str]]:
    """A job on each partition: where, and its number or why there is none."""
    seen = set()
    for call in made:
        kept = [flag for flag in call.flags if not flag.startswith(_REPLACED)]
        nodes = min(cluster.tasks(call.stage)[0], 2)
        if (nodes, *kept) in seen:
            continue
        seen.add((nodes, *kept))
        partition = next((flag.partition("=")[2] for flag in kept if flag.startswith("--partition=")), "default")
        where = f"{partition}-{call.name}"
        (folder / where).mkdir(parents=True, exist_ok=True)
        gpus = int(call.name not in WITHOUT_GPU and cluster.gpus_per_node > 0)
        settings = folder / f"{where}.settings"
        wanted = {key: value for key, value in call.settings.items() if not key.startswith("TOKSCALE_CODE")}
        settings.write_text(shell_settings(wanted | {"TOKSCALE_STATE": str(folder / "state")}))
        flags = [*kept, "--time=5", f"--nodes={nodes}", "--ntasks-per-node=1", output_flag(str(folder), f"{where}.log")]
        flags += ["--job-name=tokscale-check"]
        words = [f"settings={settings}", f"out={folder / where}", f"gpus={gpus}", f"run_dir={folder / where}"]
        told = _sbatch("--parsable", *flags, str(call.file.with_name(f"{NAME}.sbatch")), *words)
        answer = told.stdout.strip().split(";")[0]
        yield where, int(answer) if told.returncode == 0 else told.stderr.strip()


def _wait(jobs: Sequence[str], minutes: float) -> None:
    deadline = time.monotonic() + 60 * minutes
    while jobs and time.monotonic() < deadline:
        if all(state.over for state in job_states(jobs).values()):
            return
        time.sleep(_POLL_SECONDS)


def _sbatch(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["sbatch", *words], capture_output=True, text=True, env=sbatch_environ(os.environ))
    except FileNotFoundError:
        raise EnvironmentRefused("sbatch: not found; submit from a login node") from None


def _look(config: CheckConfig, env: ProcessEnv) -> NodeReport:
    problems = []
    gpus = torch.cuda.device_count()
    if gpus < config.gpus:
        problems.append(f"torch sees {gpus} GPUs; look at the driver, the torch wheel, and cluster.gpu_flag")
    interfaces = tuple(name for _, name in socket.if_nameindex())
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if interface and interface not in interfaces:
        problems.append(f"cluster.interface={interface} is none of {', '.join(interfaces)}")
    probe = config.out / f".probe-{env.rank}"
    locks, clock = _probe(probe)
    if not locks:
        log.warning("%s: no file locks there; run folders fall back to heartbeats", config.out)
    if abs(clock) > _SKEW_SECONDS:
        problems.append(f"its clock is {clock:+.0f} s off that of the file server of {config.out}")
    return NodeReport(node_name(), socket.gethostname(), gpus, interfaces, interface, locks, clock, tuple(problems))


def _probe(path: Path) -> tuple[bool, float]:
    """Whether files can be locked in a folder, and how far this machine's clock is from its file server's."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
        except OSError:
            locks = False
        file.write("x")
        file.flush()
        clock = time.time() - os.stat(path).st_mtime
    path.unlink(missing_ok=True)
    return locks, clock
