"""Looks at the machines of a job before it trains: what would show after hours as a hang is said here in seconds.

Each rank looks at its own machine, all tell each other, and the job is refused with every problem and the node it is
on. What cannot be wrong on one machine only (the data are gone) is refused without blaming a node.
"""

import hashlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

import tokscale
from tokscale.base.config import Config
from tokscale.base.files import refusal_of
from tokscale.base.kinds import for_each
from tokscale.base.log import logger
from tokscale.dist.comm import Comm
from tokscale.dist.slurm import NodesRefusedError, node_name
from tokscale.train.probes import exchanges, product

log = logger("preflight")

PACKAGES = ("torch", "deepspeed", "numpy", "einops", "pydantic", "safetensors", "tokenizers", "transformers")
_NVIDIA_SMI_SECONDS = 60
_GIB, _MIB = 1 << 30, 1 << 20


When = Literal["several", "always", "never"]
WANTED = for_each(
    When, {"several": lambda comm: comm.world > 1, "always": lambda comm: True, "never": lambda comm: False}
)


class PreflightConfig(Config):
    """What must hold before a job trains."""

    when: When = "several"
    """Look when there are several ranks, always, or never."""
    min_free_gib: float = Field(default=1.0, ge=0)
    """Free space that the run folder's file system must have, in GiB."""
    min_free_inodes: int = Field(default=1000, ge=0)
    """Files that may still be made there; file systems that do not count them pass."""
    max_clock_skew_seconds: float = Field(default=30.0, gt=0)
    """How far a machine's clock may be from the others'. Leases and locks compare times."""
    transfer_mib: float = Field(default=16.0, gt=0)
    """Size of the message that is summed over all ranks to measure bandwidth."""
    min_bandwidth_mib: float = Field(default=0.0, ge=0)
    """Least bandwidth of that sum, in MiB/s for each rank; 0 only measures."""
    files_per_rank: int = Field(default=4, ge=0)
    """Data files that each rank reads a piece of."""
    max_slowness: float = Field(default=2.0, gt=1)
    """GPUs that take so many times the median for a fixed product are refused, and so are nodes all of whose links to
    other nodes are so many times slower than the median link. On CPUs, which others share, only wrong results count."""
    exclude_bad_nodes: bool = False
    """Under Slurm: requeue the job with bad nodes excluded, rather than end it."""


@dataclass(frozen=True)
class Finding:
    """What one rank saw on its machine."""

    rank: int
    node: str
    identity: Mapping[str, str]
    """What must be equal everywhere, by name; of what is a machine's, one rank of it speaks."""
    clock: float
    """`time.time()` right after a barrier."""
    seconds: float
    """What the sum over all ranks took."""
    problems: list[str] = field(default_factory=list)
    """Of this machine."""
    product_seconds: float = 0.0
    """What a fixed product of matrices took; 0 where that says nothing, on a CPU."""
    links: Mapping[str, float] = field(default_factory=dict)
    """What an exchange with another node took, by its name; empty but on one rank of each node."""


def preflight(
    config: PreflightConfig,
    comm: Comm,
    *,
    folder: Path,
    files: Callable[[], Sequence[Path]],
    settings: Mapping[str, str],
) -> dict[str, float]:
    """Look, and refuse what is not fit. Collective.

    Args:
        config: What must hold.
        comm: The ranks.
        folder: The run folder.
        files: Lists the data files, of which a few are read; called on rank 0.
        settings: What must be equal on all ranks beside code and packages, by name.

    Returns:
        Metrics for the log: `bandwidth_mib`, `clock_skew_seconds`.

    Raises:
        NodesRefusedError: Naming every problem and its node, on all ranks.
    """
    if not WANTED[config.when](comm):
        return {}
    shared = comm.on_main("listing the data", lambda: [*files()[: config.files_per_rank * comm.world]])
    identity, problems = dict(settings), unreadable(shared[comm.rank :: comm.world])
    if comm.env.local_rank == 0:  # one of a machine: what is installed and mounted is the same for all on it
        identity |= {"code": code_fingerprint(), **package_versions()}
        problems = [*free_space(config, folder), *problems, *device_problems(required=comm.device.type == "cuda")]
    seconds, wrong = round_trip(comm, int(config.transfer_mib * _MIB))
    product_seconds, miscounted = product(comm.device)
    links, garbled = exchanges(comm, int(config.transfer_mib * _MIB))
    comm.barrier()
    problems += [*wrong, *miscounted, *garbled]
    own = Finding(comm.rank, node_name(), identity, time.time(), seconds, problems, product_seconds, links)

    def judge(findings: list[Finding]) -> tuple[list[str], list[str], dict[str, float]]:
        metrics = {
            "bandwidth_mib": config.transfer_mib / max(max(finding.seconds for finding in findings), 1e-9),
            "clock_skew_seconds": max(f.clock for f in findings) - min(f.clock for f in findings),
        }
        return *judge_findings(config, findings), metrics

    refused, nodes, metrics = comm.decide("preflight", own, judge)
    if refused:
        listed = "\n".join(f"  {line}" for line in refused)
        raise NodesRefusedError(
            f"preflight refused this job:\n{listed}\n(preflight.when=never trains regardless)",
            nodes if config.exclude_bad_nodes else (),
        )
    log.info("preflight passed: %s", ", ".join(f"{name} {value:.3g}" for name, value in metrics.items()))
    return metrics


def judge_findings(config: PreflightConfig, findings: Sequence[Finding]) -> tuple[list[str], list[str]]:
    """What is wrong, as lines that name nodes, and the nodes to avoid."""
    bad: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        bad[finding.node] += finding.problems
    lines, outvoted = differences(findings)
    for node, words in outvoted.items():
        bad[node] += words
    middle = statistics.median(finding.clock for finding in findings)
    for finding in findings:
        if (skew := finding.clock - middle) and abs(skew) > config.max_clock_skew_seconds:
            bad[finding.node].append(f"its clock is {skew:+.0f} s off; the limit is {config.max_clock_skew_seconds} s")
    for node, words in slow_devices(config, findings):
        bad[node].append(words)
    for node, words in slow_links(config, findings):
        bad[node].append(words)
    slowest = max(findings, key=lambda finding: finding.seconds)
    bandwidth = config.transfer_mib / max(slowest.seconds, 1e-9)
    if bandwidth < config.min_bandwidth_mib:
        lines.append(
            f"summing over all ranks reaches {bandwidth:.0f} MiB/s, "
            f"preflight.min_bandwidth_mib={config.min_bandwidth_mib:g}"
        )
    nodes = sorted(node for node, words in bad.items() if words)
    return lines + [f"node {node}: {word}" for node in nodes for word in dict.fromkeys(bad[node])], nodes


def slow_devices(config: PreflightConfig, findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """Nodes with a GPU that is much slower than most, and in words how much."""
    measured = [finding for finding in findings if finding.product_seconds]
    middle = statistics.median_low([finding.product_seconds for finding in measured]) if measured else 0.0
    for finding in measured:
        if finding.product_seconds > config.max_slowness * middle:
            times = finding.product_seconds / middle
            yield finding.node, f"the GPU of rank {finding.rank} takes {times:.1f} times the median for a product"


def slow_links(config: PreflightConfig, findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """Nodes all of whose links are slow: of one link alone, either end may be to blame."""
    links: dict[frozenset[str], float] = {}
    for finding in findings:
        if finding.product_seconds:
            for other, seconds in finding.links.items():
                pair = frozenset((finding.node, other))
                links[pair] = max(seconds, links.get(pair, 0.0))
    middle = statistics.median_low(links.values()) if links else 0.0
    of_node: dict[str, list[float]] = defaultdict(list)
    for pair, seconds in links.items():
        for node in pair:
            of_node[node].append(seconds)
    for node, seconds in of_node.items():
        if len(seconds) > 1 and min(seconds) > config.max_slowness * middle:
            rate = config.transfer_mib / min(seconds)
            usual = config.transfer_mib / max(middle, 1e-9)
            yield node, f"its links to other nodes reach {rate:.0f} MiB/s at best, most reach {usual:.0f}"


def differences(findings: Sequence[Finding]) -> tuple[list[str], dict[str, list[str]]]:
    """What should be equal and is not: lines where no side has the majority, and problems of outvoted nodes."""
    lines: list[str] = []
    outvoted: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for finding in findings for name in finding.identity):
        voters = [finding for finding in findings if name in finding.identity]
        values = Counter(finding.identity[name] for finding in voters)
        (common, votes), *others = values.most_common()
        if not others:
            continue
        if 2 * votes > len(voters):
            for finding in voters:
                if (value := finding.identity[name]) != common:
                    outvoted[finding.node].append(f"{name} is {value[:12]} there and {common[:12]} elsewhere")
            continue
        sides: dict[str, list[str]] = defaultdict(list)
        for finding in voters:
            sides[finding.identity[name]].append(finding.node)
        told = "; ".join(f"{value[:12]} on {', '.join(dict.fromkeys(nodes))}" for value, nodes in sides.items())
        lines.append(f"{name} differs: {told}")
    return lines, outvoted


def code_fingerprint() -> str:
    """sha256 over the source files of the package that is running."""
    folder = Path(tokscale.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of Python and of what decides about numbers; `none` where not installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def check_host_memory(
    config: PreflightConfig, comm: Comm, needed: int, *, meminfo: Path = Path("/proc/meminfo")
) -> None:
    """Compare what the ranks of each machine will need of its memory with what it has, before they take it. Collective.

    Args:
        config: `when` is heeded.
        comm: The ranks.
        needed: Bytes of host memory that this rank will take.
        meminfo: Of the kernel; tests pass their own.

    Raises:
        NodesRefusedError: Naming each node that has too little, what is needed and what helps.
    """
    if not WANTED[config.when](comm):
        return
    own = comm.env.node, node_name(), needed, available_memory(meminfo) if comm.env.local_rank == 0 else None

    def judge(ranks: list[tuple[int, str, int, int | None]]) -> list[str]:
        lines = []
        for node in sorted({rank[0] for rank in ranks}):
            here = [rank for rank in ranks if rank[0] == node]
            total, free = sum(rank[2] for rank in here), next((rank[3] for rank in here if rank[3] is not None), None)
            if free is not None and total > free:
                lines.append(
                    f"node {here[0][1]}: making the model takes {total / _GIB:.1f} GiB of host memory for {len(here)} "
                    f"ranks, and {free / _GIB:.1f} GiB are free"
                )
        return lines

    if lines := comm.decide("preflight", own, judge):
        listed = "\n".join(f"  {line}" for line in lines)
        raise NodesRefusedError(
            f"preflight refused this job:\n{listed}\n"
            "engine.sharded_init=true divides the model while it is made; without "
            "engine.offload_optimizer the host keeps no optimizer state (preflight.when=never trains regardless)"
        )


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that processes may still take on this machine, within the limit of their control group; None if unknown."""
    found = []
    with suppress(OSError, StopIteration, ValueError, IndexError):
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # `max` where there is no limit
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def free_space(config: PreflightConfig, folder: Path) -> list[str]:
    """Whether the file system of `folder` has room."""
    try:
        stat = os.statvfs(folder)
    except OSError as error:
        return [f"{folder}: {refusal_of(error)}"]
    free = stat.f_bavail * stat.f_frsize / _GIB
    problems = []
    if free < config.min_free_gib:
        problems.append(f"{folder}: {free:.1f} GiB are free, preflight.min_free_gib={config.min_free_gib:g}")
    if stat.f_files and stat.f_favail < config.min_free_inodes:
        problems.append(
            f"{folder}: {stat.f_favail} inodes are free, preflight.min_free_inodes={config.min_free_inodes}"
        )
    return problems


def unreadable(files: Iterable[Path], piece: int = 1 << 16) -> list[str]:
    """Files whose beginning and end cannot be read here."""
    problems = []
    for path in files:
        try:
            with open(path, "rb") as file:
                file.read(piece)
                file.seek(max(path.stat().st_size - piece, 0))
                file.read(piece)
        except OSError as error:
            problems.append(f"{path}: {refusal_of(error)}; is the file system mounted there?")
    return problems


def device_problems(*, required: bool) -> list[str]:
    """What `nvidia-smi` knows to be wrong with this machine's GPUs; nothing where it is not installed.

    Args:
        required: Whether it is a problem that the program fails.
    """
    try:
        told = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS)
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi: {error}"] if required else []
    if told.returncode != 0:
        return [f"nvidia-smi fails: {(told.stdout + told.stderr).strip()[:200]}"] if required else []
    return read_health(told.stdout)


def read_health(report: str) -> list[str]:
    """Problems in a report of `nvidia-smi -q`.

    They are: uncorrected ECC errors since the driver's start, rows of memory that wait to be remapped or could not be,
    and the recovery that the driver asks for after an Xid error.
    """
    problems, device, path = [], "GPU", []
    for line in report.splitlines():
        indent = len(line) - len(line.lstrip())
        name, colon, value = (part.strip() for part in line.partition(" : "))
        if line.startswith("GPU "):
            device, path = line.strip(), []
            continue
        path = [(depth, words) for depth, words in path if depth < indent]
        if not colon:
            path.append((indent, name))
            continue
        sections = [words for _, words in path]
        uncorrected = "Volatile" in sections and "Uncorrectable" in name and value.isdecimal() and int(value) > 0
        remapping = "Remapped Rows" in sections and name in ("Pending", "Remapping Failure Occurred") and value == "Yes"
        recovery = name == "GPU Recovery Action" and value not in ("None", "N/A", "[N/A]")
        if uncorrected or remapping or recovery:
            problems.append(f"{device}: {' / '.join([*sections, name])}: {value}")
    return problems


def round_trip(comm: Comm, size: int) -> tuple[float, list[str]]:
    """Sum a message of `size` bytes over all ranks: the seconds it took, and whether the sum is right. Collective."""
    message = torch.full((max(size // 4, 1),), float(comm.rank + 1), device=comm.device)
    comm.all_sum(message[:1])  # the first one builds the connections
    began = time.perf_counter()
    total = comm.all_sum(message)
    expected = comm.world * (comm.world + 1) / 2
    right = bool((total == expected).all())  # also waits for the device
    seconds = time.perf_counter() - began
    return seconds, [] if right else [
        "a sum over all ranks came out wrong here; look at this machine's memory and links"
    ]
