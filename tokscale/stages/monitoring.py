"""What is looked at while a model trains: keys, and the hooks that they ask for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tokscale.base.batch import Batch
from tokscale.base.errors import ConfigError
from tokscale.base.log import logger
from tokscale.base.protocols import Engine
from tokscale.data.loading import ImageLoader, TokenLoader
from tokscale.dist.comm import Comm
from tokscale.runs.guard import GuardedConfig
from tokscale.runs.run_folder import recorded_run
from tokscale.train.best import Best, BestConfig, standing
from tokscale.train.diagnostics import AttentionEntropy, DiagnosticsConfig, GradientNorms
from tokscale.train.held_out import HeldOutConfig, HeldOutLoss
from tokscale.train.hooks import Hook
from tokscale.train.metrics import read_metrics
from tokscale.train.profile import Profile, ProfileConfig

C = TypeVar("C", bound=GuardedConfig)
log = logger("train")
_LOOKED_AT = 4
"""Samples of a rank whose attention is looked into: every score of every layer is computed for them."""


class MonitoredConfig(GuardedConfig):
    """Keys of every stage that trains: what is measured meanwhile. None of it changes the training by one bit."""

    held_out: HeldOutConfig = HeldOutConfig()
    """The loss on the samples of `data.held_out`."""
    best: BestConfig | None = None
    """Save whatever is the best so far by a metric, keep it, and perhaps end early; null for none of it."""
    profile: ProfileConfig = ProfileConfig()
    """A few steps under torch's profiler."""
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    """Gradients by layer, and how far attention spreads."""


def common_hooks(config: MonitoredConfig, comm: Comm, folder: Path, engines: Mapping[str, Engine]) -> list[Hook]:
    """Those that every stage has, after the stage's own that measure."""
    hooks: list[Hook] = []
    if config.diagnostics.gradient_norms_every:
        hooks.append(GradientNorms(config.diagnostics.gradient_norms_every, engines))
    if config.best is not None:
        hooks.append(Best(config.best, comm, folder))
    if config.profile.steps:
        hooks.append(Profile(config.profile, comm, folder))
    return hooks


def ended_early(folder: Path, best: BestConfig | None) -> int | None:
    """The step at which the run in a folder has ended before its last one, since its patience was over."""
    if best is None or best.patience is None:
        return None
    rows = read_metrics(folder)
    return rows[-1]["step"] if rows and standing(rows, best).over(best) else None


def held_out_hook(
    config: MonitoredConfig,
    engine: Engine,
    loaders: Sequence[TokenLoader | ImageLoader],
    comm: Comm,
    micro_batch: int,
    total_steps: int,
) -> HeldOutLoss:
    """Measures on the samples of `loaders`, which training does not see: one for each shape of images."""
    most, whole = config.held_out.samples, sum(loader.samples for loader in loaders)
    # A shape with less than a sample for each rank is left out, unless there is no other.
    enough = [loader for loader in loaders if loader.samples >= comm.world] or loaders[:1]
    least = comm.world if len(loaders) > 1 else 1
    parts = [max(-(-min(most, whole) * loader.samples // whole), least) for loader in enough]
    shares = [held_out_share(loader, part, micro_batch, comm) for loader, part in zip(enough, parts, strict=True)]
    sizes = [share.size for share in shares for _ in share.batches]
    return HeldOutLoss(
        config.held_out,
        engine,
        [batch for share in shares for batch in share.batches],
        comm=comm,
        total_steps=total_steps,
        seed=config.seed,
        weights=[size / max(sizes) for size in sizes],
    )


def entropy_hook(
    config: MonitoredConfig, engine: Engine, loaders: Sequence[TokenLoader | ImageLoader], comm: Comm
) -> AttentionEntropy:
    """Looks at a few held-out samples of each rank: of images of several shapes, at those of the first.

    Raises:
        ConfigError: When none are held out, or the model has no attention that can be looked into.
    """
    if not loaders:
        raise ConfigError(
            "diagnostics.attention_entropy_every looks at held-out samples, and nothing is held out; set "
            "data.held_out.share, or attention_entropy_every=0"
        )
    read = held_out_share(loaders[0], _LOOKED_AT * comm.world, _LOOKED_AT, comm).batches[0]
    return AttentionEntropy(config.diagnostics.attention_entropy_every, engine, read, comm=comm, seed=config.seed)


def with_kept_split(config: C, key: str, folder: Path, stage: str, comm: Comm) -> C:
    """A configuration that holds out no samples, where the run in a folder began so: it has seen every sample.

    Call before the folder is claimed, which writes down what this start was asked for. Collective.
    """
    data: Any = getattr(config, key)
    there = comm.on_main(f"looking into {folder}", lambda: recorded_run(folder, stage, config).get(key))
    if not isinstance(there, Mapping) or (there.get("held_out") or {}).get("share") or not data.held_out.share:
        return config
    if comm.is_main:
        log.warning(
            "%s: began with nothing held out, and has seen every sample: %s.held_out.share=%g is left out",
            folder,
            key,
            data.held_out.share,
        )
    split = data.held_out.model_copy(update={"share": 0.0})
    return config.model_copy(update={key: data.model_copy(update={"held_out": split})})


@dataclasses.dataclass(frozen=True)
class HeldOutShare:
    """One rank's part of the held-out samples: equal forward passes on every rank, no sample twice."""

    batches: Sequence[Callable[[], Batch]]
    """Each reads one anew."""
    samples: int
    """Over all ranks."""
    size: int
    """Samples of each batch."""


def held_out_share(loader: TokenLoader | ImageLoader, most: int, micro_batch: int, comm: Comm) -> HeldOutShare:
    """Divide the first held-out samples among the ranks.

    Args:
        loader: Of the held-out samples, in their stored order.
        most: Samples over all ranks.
        micro_batch: Most samples of one forward pass on one rank.
        comm: The job.

    Raises:
        ConfigError: When there is not one sample for each rank.
    """
    count = min(most, loader.samples)
    size = min(micro_batch, count // comm.world)
    if not size:
        raise ConfigError(
            f"{count} held-out samples for {comm.world} ranks: the loss is measured on all ranks together; raise "
            "held_out.samples or data.held_out.share, or set data.held_out.share=0"
        )
    passes = count // (size * comm.world)

    def read(number: int) -> Batch:
        start = (number * comm.world + comm.rank) * size
        prepared: Any = loader.prepare(start, start + size)
        return loader.deliver(prepared)

    return HeldOutShare([partial(read, number) for number in range(passes)], passes * size * comm.world, size)
