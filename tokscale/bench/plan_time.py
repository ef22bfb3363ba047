"""How long a step of a plan takes, and what of its communication does not hide behind computing.

A step of m micro-batches computes m times, moves N parameters and N gradients, and updates. Computing is counted by
class of kernel: products by their operations, everything else by the bytes that it reads and writes. What ZeRO-3 moves
is counted (`tests/distributed/test_hpz.py`): two gatherings and one reduction of N elements a micro-batch, or, with a
second copy inside the nodes, one gathering across them a step and the others inside. Gathering goes on ahead of its
use, so of it only what is longer than computing is exposed; reductions are exposed unless `overlap_comm` is set.

The rule for the smallest work: communication hides when a GPU has at least

    tokens = (2 w + r) / 6 x peak x efficiency / bandwidth

tokens in a micro-batch, for w bytes a gathered parameter, r a reduced gradient, and the bandwidth of one GPU across
nodes: N is on both sides and drops out. Accumulation does not help, since each micro-batch moves it all again; hpZ
does.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import Field, PositiveInt

from tokscale.base.config import Config, PathKey
from tokscale.engine.config import ZeroConfig
from tokscale.engine.ds_config import reduction_dtype

WIDTH = {"fp32": 4, "bf16": 2}
_LATENCY = 20e-6
"""Seconds that a collective takes to begin, for each doubling of its ranks."""
_HOST_UPDATES = 50e9
"""Bytes per second that a host reads and writes in an update, for one GPU's share of it."""
DRAWN = tuple(2**power for power in range(3, 12))
"""GPUs in the picture: 8 to 2,048."""


class TimeConfig(Config):
    """Keys about time; the defaults are those of an H200 with NVLink and one 400 Gbit/s link a GPU."""

    batch_size: PositiveInt | None = None
    """Samples of a step over all GPUs; null: one micro-batch on each."""
    tokens: float = Field(default=0.0, ge=0)
    """Tokens of the whole training, for hours and days; 0: none are said."""
    peak_flops: float = Field(default=989.4e12, gt=0)
    """Of one GPU in the plan's arithmetic, per second."""
    efficiency: float = Field(default=0.6, gt=0, le=1)
    """Share of the peak that matrix products reach; `bench gpu` measures it."""
    memory_bandwidth: float = Field(default=4.8e12, gt=0)
    """Bytes per second of one GPU's memory."""
    node_bandwidth: float = Field(default=350e9, gt=0)
    """Bytes per second of one GPU to the others of its node."""
    link_bandwidth: float = Field(default=50e9, gt=0)
    """Bytes per second of one GPU to other nodes."""
    host_bandwidth: float = Field(default=50e9, gt=0)
    """Bytes per second between one GPU and its host."""
    save_bandwidth: float = Field(default=2e9, gt=0)
    """Bytes per second at which one GPU's share of a checkpoint is copied to the host, before it is written behind."""
    every_steps: PositiveInt = 1000
    """Steps between saves."""
    overlap_comm: bool = False
    """Whether reductions go on beside the backward pass."""
    figure: PathKey | None = None
    """Where step time and MFU from 8 to 2,048 GPUs are drawn, as a PNG."""


@dataclass(frozen=True)
class Work:
    """What one micro-batch of one sample is, whatever it runs on."""

    parameters: int
    flops: float
    """Of matrix products, forward and backward, of one sample."""
    kept: float
    """Bytes that autograd keeps of one sample without recomputation."""
    tokens: int
    """Of one sample."""
    layers: int
    update_bytes: float
    """Read and written by the optimizer for each parameter."""


@dataclass(frozen=True)
class Choice:
    """How a step is run."""

    gpus: int
    micro_batch_size: int
    micro_batches: int = 1
    remat: str = "none"
    hpz: bool = False
    offload: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what follows."""

    compute: float
    exposed_gather: float
    exposed_reduce: float
    optimizer: float
    save: float
    """Of one save, divided over the steps between two."""
    hidden: float
    """Communication behind computing; no part of the sum."""
    tokens: float
    """Of the step, on all GPUs."""
    mfu: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.exposed_gather + self.exposed_reduce + self.optimizer + self.save

    @property
    def exposed(self) -> float:
        """Share of the step that waits for communication."""
        return (self.exposed_gather + self.exposed_reduce) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.tokens / self.seconds


def step_time(work: Work, choice: Choice, config: TimeConfig, *, dtype: str, gpus_per_node: int) -> StepTime:
    """Time of a step.

    Args:
        work: Of the model.
        choice: How it runs.
        config: Of the cluster.
        dtype: `fp32` or `bf16`, of parameters and activations.
        gpus_per_node: GPUs of a machine.
    """
    size, m = choice.micro_batch_size, choice.micro_batches
    again = 4 / 3 if choice.remat != "none" else 1.0  # forward is a third, and is done once more
    products = size * work.flops * again / (config.peak_flops * config.efficiency)
    # Each kept tensor is written by one kernel and read by the next, and once more in the backward pass, which writes
    # and reads a gradient of its size.
    others = size * work.kept * (3 + 2 * again) / config.memory_bandwidth
    compute = m * (products + others)
    across, inside = _gathered(work, choice, dtype, gpus_per_node)
    messages = work.layers * _LATENCY * math.log2(max(choice.gpus, 2))
    slow = config.link_bandwidth if choice.gpus > gpus_per_node else config.node_bandwidth
    gather = across / slow + inside / config.node_bandwidth + 2 * m * messages
    width = WIDTH[reduction_dtype(ZeroConfig(dtype=dtype), choice.gpus)]  # pyright: ignore[reportArgumentType]
    reduce = m * (width * work.parameters * _others(choice.gpus) / slow + messages)
    if choice.gpus == 1:
        gather = reduce = 0.0
    exposed_gather = max(gather - compute, 0.0)
    room = max(compute - gather, 0.0) * 2 / 3 if config.overlap_comm else 0.0  # the backward pass is two thirds
    exposed_reduce = max(reduce - room, 0.0)
    share = work.parameters / choice.gpus
    optimizer = share * work.update_bytes / (_HOST_UPDATES if choice.offload else config.memory_bandwidth)
    if choice.offload:
        optimizer += share * (4 + WIDTH[dtype]) / config.host_bandwidth
    save = share * 12 / config.save_bandwidth / config.every_steps
    tokens = float(choice.gpus * size * m * work.tokens)
    made = StepTime(compute, exposed_gather, exposed_reduce, optimizer, save, 0.0, tokens, 0.0)
    mfu = size * m * work.flops / (config.peak_flops * made.seconds)
    return replace(made, hidden=gather + reduce - exposed_gather - exposed_reduce, mfu=mfu)


@dataclass(frozen=True)
class Travel:
    """How often all parameters travel in a step."""

    across: int
    """Gatherings over all ranks; with hpZ across nodes."""
    inside: int
    """Gatherings inside each node."""
    reduced: int
    """Reductions over all ranks."""


def travel(micro_batches: int, *, hpz: bool) -> Travel:
    """Of ZeRO-3: each micro-batch gathers for its forward pass and again for its backward pass, and reduces once.

    With a second copy inside the nodes only the first gathering of a step goes across them.
    """
    gathered, across = 2 * micro_batches, 1 if hpz else 2 * micro_batches
    return Travel(across, gathered - across, micro_batches)


def _gathered(work: Work, choice: Choice, dtype: str, gpus_per_node: int) -> tuple[float, float]:
    """Bytes that one GPU receives of gathered parameters in a step: across nodes (or all), and inside its node."""
    whole = WIDTH[dtype] * work.parameters
    found = travel(choice.micro_batches, hpz=choice.hpz and choice.gpus > gpus_per_node)
    return found.across * whole * _others(choice.gpus), found.inside * whole * _others(gpus_per_node)


def _others(ranks: int) -> float:
    """Share of a divided tensor that lies on other ranks."""
    return (ranks - 1) / ranks


def smallest_tokens(config: TimeConfig, dtype: str, gpus: int, *, link: float | None = None) -> float:
    """Tokens of a micro-batch on one GPU from which communication hides behind products. See the module.

    Args:
        config: Of the cluster.
        dtype: Of parameters.
        gpus: All of them: from 64 on gradients travel in fp32.
        link: Bytes per second of one GPU to the others; by default across nodes.
    """
    reduced = WIDTH[reduction_dtype(ZeroConfig(dtype=dtype), gpus)]  # pyright: ignore[reportArgumentType]
    moved = 2 * WIDTH[dtype] + reduced
    return moved / 6 * config.peak_flops * config.efficiency / (link or config.link_bandwidth)


def choices(gpus: int, config: TimeConfig, remats: Sequence[str], gpus_per_node: int, most: int) -> Iterator[Choice]:
    """What may be run on so many GPUs: every recomputation, with and without hpZ and offload, and micro-batches.

    Args:
        gpus: All of them.
        config: Whose `batch_size` decides how many micro-batches make a step.
        remats: Values of `remat`.
        gpus_per_node: GPUs of a machine.
        most: Largest micro-batch to try.
    """
    share = None if config.batch_size is None else config.batch_size / gpus
    if share is not None and (share < 1 or share % 1):
        return
    size = 1
    while size <= min(most, share or most):
        if share is None or share % size == 0:
            count = 1 if share is None else int(share) // size
            for remat in remats:
                for hpz in (False, True) if gpus > gpus_per_node else (False,):
                    for offload in (False, True):
                        yield Choice(gpus, size, count, remat, hpz, offload)
        size *= 2


def best(
    work: Work,
    candidates: Sequence[Choice],
    config: TimeConfig,
    fits: Callable[[Choice], bool],
    *,
    dtype: str,
    gpus_per_node: int,
) -> tuple[Choice, StepTime] | None:
    """The choice that fits and trains most tokens a second; None when none fits."""
    found = [
        (choice, step_time(work, choice, config, dtype=dtype, gpus_per_node=gpus_per_node))
        for choice in candidates
        if fits(choice)
    ]
    return max(found, key=lambda pair: (pair[1].tokens_per_second, -pair[0].offload, -pair[0].hpz), default=None)


def days(time: StepTime, tokens: float) -> float:
    """Of training on so many tokens."""
    return tokens / time.tokens_per_second / 86_400


def table(found: Mapping[int, tuple[Choice, StepTime] | None], config: TimeConfig) -> list[str]:
    """One line for each number of GPUs, as a recipe's header holds them."""
    lines = []
    for gpus, pair in found.items():
        if pair is None:
            lines.append(f"{gpus:5d} GPUs: nothing fits, or batch_size={config.batch_size} does not divide")
            continue
        choice, time = pair
        times = f" x {choice.micro_batches}" if choice.micro_batches > 1 else ""
        how = [f"micro batch {choice.micro_batch_size}{times}", f"remat {choice.remat}"]
        how += ["hpZ"] * choice.hpz + ["offload"] * choice.offload
        line = f"{gpus:5d} GPUs: {time.seconds:.3g} s a step, {time.tokens_per_second:.3g} tokens/s"
        line += f", MFU {100 * time.mfu:.0f} %, {100 * time.exposed:.0f} % waits for links"
        if config.tokens:
            line += f", {days(time, config.tokens):.3g} days, {24 * gpus * days(time, config.tokens):.3g} GPU-hours"
        lines.append(f"{line}; {', '.join(how)}")
    return lines


def stops_hiding(found: Mapping[int, tuple[Choice, StepTime] | None], share: float = 0.1) -> int | None:
    """The smallest number of GPUs at which more than a tenth of the step waits for links; None when none does."""
    return next((gpus for gpus, pair in found.items() if pair is not None and pair[1].exposed > share), None)


def draw(found: Mapping[int, tuple[Choice, StepTime] | None], title: str, path: Path) -> None:
    """Parts of the step, and MFU, over the number of GPUs, with the point where communication stops hiding."""
    from matplotlib.figure import Figure

    there = {gpus: pair[1] for gpus, pair in found.items() if pair is not None}
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    parts = ("compute", "exposed_gather", "exposed_reduce", "optimizer", "save")
    shares = [[asdict(time)[part] / time.seconds for time in there.values()] for part in parts]
    left.stackplot(list(there), shares, labels=[part.replace("_", " ") for part in parts])
    left.set(xscale="log", xlabel="GPUs", ylabel="share of a step", title=title)
    left.legend(fontsize=6, loc="lower left")
    right.plot(list(there), [100 * time.mfu for time in there.values()], marker="o")
    right.set(xscale="log", xlabel="GPUs", ylabel="MFU, %", ylim=(0, 100))
    if (point := stops_hiding(found)) is not None:
        for axes in (left, right):
            axes.axvline(point, color="black", linestyle=":")
        right.set_title(f"communication stops hiding at {point} GPUs", fontsize=8)
    for axes in (left, right):
        axes.set_xticks(list(there), [str(gpus) for gpus in there], fontsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
