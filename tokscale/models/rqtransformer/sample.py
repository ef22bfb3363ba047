"""Drawing codes one at a time: a cache for each stage, of which the finer ones start anew at each coarser entry."""

import functools
import math
from collections.abc import Sequence

import torch
from einops import rearrange

from tokscale.base.shapes import Float, Int, Tensor
from tokscale.models.grids import Grid
from tokscale.models.rqtransformer.config import RQSampling
from tokscale.models.rqtransformer.network import HierarchicalNetwork, Stage
from tokscale.nn.attention.decode import DeviceStep
from tokscale.nn.conditioning import Context
from tokscale.nn.replay import StepRunner
from tokscale.nn.sampling import SampleStreams, sample_ids


def sample_codes(
    net: HierarchicalNetwork,
    context: Context | None,
    prime: Int[Tensor, "batch primed"],
    options: RQSampling,
    seeds: Sequence[int],
    grid: Grid | None = None,
) -> Int[Tensor, "batch image"]:
    """Draw what follows the first codes.

    With guidance, each sample and its twin without a condition go through the network as rows of one batch with one
    cache per stage, so that neither sees the other's entries.
    """
    sampler = _Sampler(net, prime, options, seeds, grid)
    if sampler.guided and context is not None:
        hidden = context.only(torch.zeros_like(context.mask[:, 0]))
        context = Context(torch.cat([context.states, hidden.states]), torch.cat([context.mask, hidden.mask]))
    sampler.run(net.opening(sampler.rows, context))
    return sampler.codes


class _Sampler:
    def __init__(
        self, net: HierarchicalNetwork, prime: Tensor, options: RQSampling, seeds: Sequence[int], grid: Grid | None
    ):
        self.net, self.options, self.grid = net, options, grid
        self.lengths = net.lengths_of(grid)
        self.known = prime.shape[1]
        self.guided = options.guided and net.config.condition is not None
        self.rows = len(prime) * (2 if self.guided else 1)
        self.codes = prime.new_zeros(len(prime), math.prod(self.lengths))
        self.codes[:, : self.known] = prime
        self.streams = SampleStreams(seeds, [f"code/{number}" for number in range(self.codes.shape[1])], prime.device)
        where = {"device": net.opening.start.device, "dtype": net.opening.start.dtype}
        self.stages = [stage for stage in net.stages if isinstance(stage, Stage)]
        layouts = [net.layout_of(grid), *[None] * (len(self.stages) - 1)]
        self.caches = [
            stage.stack.new_cache(self.rows, layout=layout, **where)
            for stage, layout in zip(self.stages, layouts, strict=True)
        ]

    def run(self, opening: Float[Tensor, "rows n dim"]) -> None:
        """Draw all codes that are not known."""
        length = self.lengths[0]
        size = self.codes.shape[1] // length
        if not StepRunner.wanted(self.codes.device):
            self.fill(0, opening, self.codes, 0, self.known)
            return
        begun = self.known // size
        # Entries that are known in part, and the one before the captured steps, are drawn as the host says.
        self.fill(0, opening, self.codes, 0, self.known, stop=begun + 1)
        at = torch.full((1,), begun + 1, device=self.codes.device)
        runner = StepRunner(functools.partial(self._entry, at), self.codes.device)
        for count in range(begun + 1, length):
            runner.run(count, most=length)

    def _entry(self, at: Tensor, reach: int) -> None:
        """Draw the codes of the coarsest stage's entry `at`, from the entry before it."""
        size = self.codes.shape[1] // self.lengths[0]
        inner = self.lengths[1:]
        entries = self.codes.unflatten(1, (-1, size))
        before = entries.index_select(1, at - 1).unflatten(2, inner) if inner else self.codes.index_select(1, at - 1)
        before = torch.cat([before, before]) if self.guided else before
        x = self.net.inputs(before, stage=0, start=at - 1, grid=self.grid)[0]
        text = self.stages[0].stack.layout.text
        state = self.stages[0](x, self.caches[0], DeviceStep(text + at - 1, reach))[:, -1]
        drawn = torch.zeros_like(self.codes[:, :size])
        if inner:
            self.fill(1, rearrange(state, "b d -> b 1 d"), drawn, at * size, 0)
        else:
            drawn[:, 0] = self._drawn(self.net.head(state).float(), at, 0)
        entries.index_copy_(1, at, drawn[:, None])
        at.add_(1)

    def fill(
        self,
        stage: int,
        opening: Float[Tensor, "rows n dim"],
        codes: Int[Tensor, "batch below"],
        number: int | Int[Tensor, "1"],
        known: int,
        stop: int | None = None,
    ) -> None:
        """Draw all codes below one coarser entry, or below the first `stop` of this stage's entries.

        Args:
            stage: Whose entries they are.
            opening: What its sequence begins with.
            codes: Where they go.
            number: Of the first of them in the image.
            known: How many of them are known, and stay.
            stop: All entries when left out.
        """
        length, inner = self.lengths[stage], self.lengths[stage + 1 :]
        size = math.prod(inner)
        done = min(max(known, 0) // size, length)
        cache = self.caches[stage]
        cache.reset()
        x = opening
        if done:
            x = torch.cat([x, self._entries(stage, codes, 0, done)], dim=1)
        stop = length if stop is None else stop
        for at in range(done, stop):
            state = self.stages[stage](x, cache)[:, -1]
            if inner:
                below = codes[:, at * size : (at + 1) * size]
                self.fill(stage + 1, rearrange(state, "b d -> b 1 d"), below, number + at * size, known - at * size)
            else:
                codes[:, at] = self._drawn(self.net.head(state).float(), number + at, at)
            if at + 1 < stop:
                x = self._entries(stage, codes, at, at + 1)

    def _entries(
        self, stage: int, codes: Int[Tensor, "batch below"], start: int, stop: int
    ) -> Float[Tensor, "rows n dim"]:
        """Embedded entries `[start, stop)` of the sequence that `codes` lie below."""
        inner = self.lengths[stage + 1 :]
        size = math.prod(inner)
        # A running sum needs the codes before, of which there are few.
        first = 0 if self.net.config.cumulative_depth and not inner else start
        codes = codes[:, first * size : stop * size].unflatten(1, (stop - first, *inner))
        codes = torch.cat([codes, codes]) if self.guided else codes
        return self.net.inputs(codes, stage=stage, start=first, grid=self.grid)[0][:, start - first :]

    def _drawn(
        self, logits: Float[Tensor, "rows vocab"], number: int | Int[Tensor, "1"], level: int
    ) -> Int[Tensor, " batch"]:
        if self.guided:
            logits = self.options.guide(logits, number, self.codes.shape[1])
        temperature, filter_thres, top_p = self.options.at(level)
        return sample_ids(
            logits,
            self.streams,
            f"code/{number}" if isinstance(number, int) else number,
            temperature=temperature,
            filter_thres=filter_thres,
            top_p_mass=top_p,
        )
