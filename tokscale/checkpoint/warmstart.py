"""Starting a new run from another run's weights.

This is not a resume: only weights, frozen parameters and buffers are taken; moments, counters, schedule and data begin
anew, and averages begin at the weights taken. The values come by range through the engine's own `load`, so it works
for every layout and no rank ever holds the whole model.
"""

import fnmatch
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.log import logger
from tokscale.base.protocols import Engine
from tokscale.base.state import TensorShard
from tokscale.checkpoint.audit import Audit, audit_checkpoint, audit_export
from tokscale.checkpoint.commit import checkpoint_folders
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.manifest import INDEX, STATE, Manifest
from tokscale.checkpoint.outgoing import weights_slot
from tokscale.checkpoint.reader import Checkpoint, CheckpointSource
from tokscale.checkpoint.resizing import Resizing
from tokscale.checkpoint.soundness import first_not_finite
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.verify import read_small
from tokscale.checkpoint.weights import CONFIG, WeightFolder, check_fit, tied_names
from tokscale.dist.comm import Comm

_log = logger("checkpoint")
_STORED = ("weight", "frozen", "buffer")


@dataclass(frozen=True)
class WarmStarted:
    """What a warm start took over, tensor by tensor."""

    loaded: tuple[str, ...]
    """As they were stored, or resized."""
    fresh: tuple[str, ...]
    """Tensors of the model that were excluded and keep their initial values."""
    resized: Mapping[str, str] = field(default_factory=dict)
    """Of those that were loaded, the ones of another size or vocabulary: what was done, in words."""


def warm_start(
    engine: Engine,
    init_from: Path | str,
    comm: Comm,
    *,
    exclude: Sequence[str] = (),
    weights: str = "raw",
    stored_engine: str | None = None,
    resizing: Resizing | None = None,
) -> WarmStarted:
    """Fill a freshly built engine with stored weights. Collective.

    Args:
        engine: Before its first step.
        init_from: An export, one checkpoint, or a folder of checkpoints (its newest complete one is taken).
        comm: The job.
        exclude: Names or patterns (`head.*`) that are not taken over: tensors of the model, or stored ones. The rest
            must fit exactly.
        weights: Of a checkpoint: `raw`, or an average.
        stored_engine: Of a checkpoint: which engine's weights; by default the one of `engine`'s name.
        resizing: How models whose vocabularies, grids or caption lengths differ are brought together; by default all
            must be equal.

    What is read is hashed meanwhile, and must be finite.

    Raises:
        CheckpointError: When names or shapes differ beyond `exclude`, or the stored weights are damaged.
        ConfigError: When an exclusion excludes nothing, or `init_from` is neither kind of folder.
    """
    own = _gather_tensor_specs(engine, comm)
    with _opened(Path(init_from), stored_engine or engine.name, weights, comm) as stored:
        with comm.raise_together(f"warm start from {init_from}"):
            excluded = _excluded({*own, *stored.names()}, exclude)
            resized = {name for name in own if name not in excluded and resizing and resizing.changes(name)}
            taken_whole = lambda name: name not in excluded and name not in resized  # noqa: E731
            check_fit(
                {name: shape for name, (shape, _) in own.items() if taken_whole(name)},
                {name: stored.shape(name) for name in stored.names() if taken_whole(name)},
                where=str(init_from),
                tied=tied_names(engine.model),
            )
        audit = stored.audit(comm)
        source = _WarmSource(engine, stored, own, excluded, resizing if resized else None, resized)
        engine.load(source)
        problem = audit.problem()
        if problem is None and (found := first_not_finite({engine.name: engine}, comm)) is not None:
            problem = f"{found} is not finite"
    if problem is not None:
        raise CheckpointError(f"init_from: {init_from} cannot be trained from: {problem}; take another checkpoint")
    done = WarmStarted(
        loaded=tuple(name for name in own if name not in excluded),
        fresh=tuple(name for name in own if name in excluded),
        resized={name: source.what_of(name) for name in own if name in resized},
    )
    if comm.is_main:
        for name, what in done.resized.items():
            _log.info("warm start: %s: %s", name, what)
        fresh = f"; fresh: {', '.join(done.fresh)}" if done.fresh else ""
        _log.info("warm start (not a resume): %d tensors from %s%s", len(done.loaded), init_from, fresh)
    return done


def _gather_tensor_specs(engine: Engine, comm: Comm) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and slots of every tensor of the engine, on whichever rank it lies."""
    found: dict[str, tuple[tuple[int, ...], dict[str, None]]] = {}
    for shapes in comm.gather_objects([(shard.name, shard.slot, tuple(shard.shape)) for shard in engine.shards()]):
        for name, slot, shape in shapes:
            found.setdefault(name, (shape, {}))[1][slot] = None
    return {name: (shape, tuple(slots)) for name, (shape, slots) in found.items()}


def _excluded(names: set[str], patterns: Sequence[str]) -> frozenset[str]:
    """The names that match a pattern.

    Raises:
        ConfigError: When a pattern matches none: it is misspelt, and would make the rest look right.
    """
    excluded: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ConfigError(f"exclude: {pattern!r} matches no tensor of the model or of the stored weights")
        excluded.update(matching)
    return frozenset(excluded)


class _Stored(Protocol):
    """Stored weights by name and range."""

    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read_range(self, name: str, start: int, stop: int) -> Tensor: ...

    def audit(self, comm: Comm) -> Audit: ...


class _CheckpointWeights:
    """One kind of weights of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, source: CheckpointSource, weights: str):
        self._checkpoint, self._source = checkpoint, source
        self._slots = {name: weights_slot(source, name, weights) for name in source.names()}

    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name, self._slots[name])

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.read(name, self._slots[name], start, stop)

    def audit(self, comm: Comm) -> Audit:
        return audit_checkpoint(self._checkpoint, [self._source.engine], comm)


class _ExportWeights:
    """The weights of an export."""

    def __init__(self, folder: WeightFolder):
        self._folder = folder
        self.names, self.shape, self.read_range = folder.names, folder.shape, folder.read_range

    def audit(self, comm: Comm) -> Audit:
        return audit_export(self._folder, self._folder.names(), comm)


def _kind_of(folder: Path) -> Literal["export", "one", "several", "run"]:
    if (folder / CONFIG).exists():
        return "export"
    if (folder / INDEX).exists():
        return "one"
    if checkpoint_folders(folder):
        return "several"
    if checkpoint_folders(folder / "checkpoints"):
        return "run"
    raise ConfigError(
        f"init_from: {folder} is neither an export nor a checkpoint nor a folder of checkpoints nor a run folder "
        "with some in it"
    )


def _open_on_main(folder: Path, comm: Comm) -> Checkpoint:
    def read() -> tuple[Manifest, dict[str, bytes]]:
        manifest = Checkpoint(folder).manifest
        return manifest, {name: read_small(folder, manifest, name) for name in (INDEX, STATE)}

    return Checkpoint(folder, *comm.on_main(f"opening {folder}", read))


@contextmanager
def _opened(folder: Path, engine: str, weights: str, comm: Comm) -> Iterator[_Stored]:
    kind = comm.on_main(f"looking at {folder}", lambda: _kind_of(folder))
    if kind == "export":
        with comm.raise_together(f"opening {folder}"):
            stored = WeightFolder(folder)
        with stored:
            yield _ExportWeights(stored)
        return
    store = CheckpointStore(folder / "checkpoints" if kind == "run" else folder, CheckpointConfig(), comm)
    found = _open_on_main(folder, comm) if kind == "one" else store.newest()
    assert found is not None
    with comm.raise_together(f"opening {found.folder}"):
        source = found.source(engine)
        stored = _CheckpointWeights(found, source, weights)
    with source:
        yield stored


class _WarmSource:
    """A `ShardSource` that answers with stored weights, and with the engine's own fresh state for all else."""

    def __init__(
        self,
        engine: Engine,
        stored: _Stored,
        own: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]],
        excluded: frozenset[str],
        resizing: Resizing | None = None,
        resized: Collection[str] = (),
    ):
        self._resizing, self._resized = resizing, resized
        self._made: dict[str, tuple[Tensor, Tensor]] = {}
        self.scalars: Mapping[str, Any] = json.loads(json.dumps(engine.scalars()))
        self._stored, self._own, self._excluded = stored, own, excluded
        self._fresh: dict[tuple[str, str], list[TensorShard]] = {}
        for shard in engine.shards():
            self._fresh.setdefault((shard.name, shard.slot), []).append(shard)

    def names(self) -> tuple[str, ...]:
        """The engine's own tensors."""
        return tuple(self._own)

    def slots(self, name: str) -> tuple[str, ...]:
        """The engine's own slots."""
        return self._own[name][1]

    def shape(self, name: str, slot: str) -> tuple[int, ...]:
        """The engine's own shape."""
        del slot
        return self._own[name][0]

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Stored values for weights, averages, frozen parameters and buffers; fresh ones for the rest."""
        if name not in self._excluded and (slot in _STORED or slot.startswith("ema/")):
            if name not in self._resized:
                return self._stored.read_range(name, start, stop)
            value, known = (part[start:stop] for part in self._whole(name))
            return value if bool(known.all()) else torch.where(known, value, self._own_values(name, slot, start, stop))
        return self._own_values(name, slot, start, stop)

    def what_of(self, name: str) -> str:
        """What became of a resized weight, in words."""
        _, known = self._whole(name)
        rows = self._own[name][0][0]
        taken = int(known.view(rows, -1)[:, 0].sum())
        stored = tuple(self._stored.shape(name))
        return f"{stored} stored, {self._own[name][0]} here: {taken} rows taken over, {rows - taken} new"

    def _whole(self, name: str) -> tuple[Tensor, Tensor]:
        """The resized weight, flat, and which of its elements have a value. Small beside a model, so kept whole."""
        if name not in self._made:
            assert self._resizing is not None
            shape = self._stored.shape(name)
            value, known = self._resizing.resized(name, self._stored.read_range(name, 0, math.prod(shape)).view(shape))
            known = known.view(-1, *[1] * (value.dim() - 1)).expand_as(value)
            self._made[name] = value.reshape(-1), known.reshape(-1)
        return self._made[name]

    def _own_values(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        for shard in self._fresh.get((name, slot), []):
            if shard.start <= start and stop <= shard.start + shard.data.numel():
                return shard.data.detach()[start - shard.start : stop - shard.start].to("cpu", copy=True)
        raise CheckpointError(f"{name!r} ({slot}): elements [{start}, {stop}) are not on this rank")
