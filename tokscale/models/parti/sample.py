"""Drawing codes one by one, with everything before them and the caption in a cache."""

from collections.abc import Sequence
from typing import Any

import torch

from tokscale.base.shapes import Int, Tensor
from tokscale.models.grids import Grid
from tokscale.models.parti.config import PartiSampling
from tokscale.models.parti.network import PartiNetwork
from tokscale.nn.attention.decode import DeviceStep
from tokscale.nn.conditioning import Context
from tokscale.nn.replay import StepRunner
from tokscale.nn.sampling import SampleStreams, sample_ids


def sample_codes(
    net: PartiNetwork, context: Context, options: PartiSampling, seeds: Sequence[int], grid: Grid
) -> Int[Tensor, "batch image"]:
    """Draw the codes of an image of this grid for each caption.

    With guidance, each caption and its hidden twin are rows of one batch with one cache. The cost of a code is the same
    for all of them but for the attention to the codes before.
    """
    guided = options.guided
    rows, count = len(context.mask), grid[0] * grid[1]
    if guided:
        hidden = context.only(torch.zeros_like(context.mask[:, 0]))
        context = Context(*(torch.cat(pair) for pair in zip(context, hidden, strict=True)))
    codes = torch.zeros(rows, count, dtype=torch.long, device=context.mask.device)
    x = net.embed(codes[:, :0], grid=grid)
    memory = net.decoder.remember(context, x.dtype, grid)
    streams = SampleStreams(seeds, [f"code/{at}" for at in range(count)], codes.device)

    def drawn(x: Tensor, at: int | Tensor, step: DeviceStep | None = None) -> Tensor:
        x = torch.cat([x, x]) if guided else x
        position: Any = at if step is None else step
        logits = net.head(net.decoder.step(x, position, memory))[:, 0].float()
        if guided:
            logits = options.guide(logits, at, count)
        return sample_ids(
            logits,
            streams,
            f"code/{at}" if isinstance(at, int) else at,
            temperature=options.temperature,
            filter_thres=options.filter_thres,
            top_p_mass=options.top_p,
        )

    codes[:, 0] = drawn(x, 0)
    if not StepRunner.wanted(codes.device):
        for at in range(1, count):
            codes[:, at] = drawn(net.embed(codes[:, at - 1 : at], start=at - 1, grid=grid), at)
        return codes

    at = torch.ones(1, dtype=torch.long, device=codes.device)

    def step(reach: int) -> None:
        """Draw code `at`, from the code before it."""
        x = net.embed(codes.index_select(1, at - 1), start=at - 1, grid=grid)
        codes.index_copy_(1, at, drawn(x, at, DeviceStep(at, reach))[:, None])
        at.add_(1)

    runner = StepRunner(step, codes.device)
    for number in range(1, count):
        runner.run(number, most=count)
    return codes
