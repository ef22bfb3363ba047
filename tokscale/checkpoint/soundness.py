"""Whether a state is worth keeping: every weight, moment and average is a finite number.

Of buffers and frozen parameters only NaN counts: a mask may well hold infinities.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch

from tokscale.base.state import Persistent, TensorShard
from tokscale.dist.comm import Comm


def first_not_finite(engines: Mapping[str, Persistent], comm: Comm) -> str | None:
    """The first tensor of any engine that holds NaN or infinity, on whichever rank. Collective, equal on all ranks.

    One fused pass over the shards and one transfer from the device; only a state that is found wanting is looked at
    tensor by tensor.
    """
    mine = None
    for name, engine in engines.items():
        shards = [shard for shard in engine.shards() if shard.data.is_floating_point() and shard.data.numel()]
        if mine is None and not _all_finite(shards):
            shard = next(shard for shard in shards if not _all_finite([shard]))
            mine = f"{shard.name} ({shard.slot}) of engine {name!r}"
    return comm.first(mine)


@torch.no_grad()
def _all_finite(shards: list[TensorShard]) -> bool:
    extremes: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
    for shard in shards:
        # NaN wins in both, and neither can overflow as a sum would; on a CPU this is 25 times as fast as isfinite.
        found = torch.aminmax(shard.data.detach())
        if shard.slot in ("buffer", "frozen"):
            found = [torch.zeros_like(value).masked_fill(value.isnan(), torch.nan) for value in found]
        extremes[shard.data.device, shard.data.dtype] += found
    return all(bool(torch.stack(values).isfinite().all()) for values in extremes.values())
