"""Fill an engine's ranges from a checkpoint of any layout, reading each byte once over all ranks."""

from collections.abc import Iterable

import torch
import torch.distributed as torch_dist

from tokscale.base.errors import CheckpointError
from tokscale.base.log import logger
from tokscale.base.state import ShardSource
from tokscale.dist.comm import Comm
from tokscale.engine.fragments import StateTensor

log = logger("engine")


def load_held(source: ShardSource, ranges: list[StateTensor], comm: Comm, trained: Iterable[str]) -> None:
    """Copy what `source` stores into `ranges`. Collective; nothing is written unless every rank finds all it needs.

    Ranges that every rank holds are read in equal parts and exchanged. An average that was not saved starts from the
    weights.

    Args:
        source: The checkpoint.
        ranges: This rank's state; on every rank the same replicated ranges in the same order.
        comm: The job.
        trained: Names of all tensors of the model, on this rank or not.

    Raises:
        CheckpointError: When names, shapes or optimizer states do not fit, or a read fails; on every rank.
    """
    with comm.raise_together("matching the checkpoint with the model"):
        plan = _match(source, ranges, set(trained))
    failure: Exception | None = None
    for entry, slot in plan:
        start, stop = entry.share(comm.rank, comm.world)
        piece = torch.zeros(stop - start, dtype=entry.data.dtype)
        if failure is None and start < stop:
            try:
                piece = source.read(entry.name, slot, entry.start + start, entry.start + stop).to(entry.data.dtype)
            except Exception as error:  # the exchange below must still happen on this rank
                failure = error
        entry.data.copy_(_exchange(piece, entry, comm) if entry.replicated and comm.world > 1 else piece)
    with comm.raise_together("reading the checkpoint"):
        if failure is not None:
            raise failure


def _match(source: ShardSource, ranges: list[StateTensor], names: set[str]) -> list[tuple[StateTensor, str]]:
    """Which stored slot fills each range.

    Raises:
        CheckpointError: At the first thing that does not fit.
    """
    stored = set(source.names())
    if stored != names:
        missing, extra = sorted(names - stored), sorted(stored - names)
        raise CheckpointError(
            f"the checkpoint is of another model: {len(missing)} tensors are missing from it (first {missing[:3]}), "
            f"{len(extra)} are unknown to the model (first {extra[:3]})"
        )
    plan = []
    for entry in ranges:
        slots = source.slots(entry.name)
        slot = entry.slot
        if slot not in slots and slot.startswith("ema/") and "weight" in slots:
            log.warning("%s: no %s in the checkpoint; the average starts from the weights", entry.name, slot)
            slot = "weight"
        if slot not in slots:
            raise CheckpointError(
                f"{entry.name}: the checkpoint has {', '.join(slots) or 'nothing'}, but this run needs {slot!r}; "
                "resume with the optimizer and frozen parameters it was saved with, or start anew from its weights"
            )
        if tuple(source.shape(entry.name, slot)) != entry.shape:
            raise CheckpointError(
                f"{entry.name} ({slot}): shape {tuple(source.shape(entry.name, slot))} in the checkpoint, "
                f"{entry.shape} in the model"
            )
        plan.append((entry, slot))
    return plan


def _exchange(piece: torch.Tensor, entry: StateTensor, comm: Comm) -> torch.Tensor:
    size = -(-entry.data.numel() // comm.world)
    padded = torch.zeros(size, dtype=piece.dtype, device=entry.data.device)
    padded[: piece.numel()] = piece
    whole = torch.empty(comm.world, size, dtype=piece.dtype, device=entry.data.device)
    torch_dist.all_gather(list(whole.unbind()), padded)
    return whole.view(-1)[: entry.data.numel()]
