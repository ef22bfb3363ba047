"""Drawing codes one at a time: a cache for each stage, of which the finer ones start anew at each coarser entry."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange

from tokscale.base.shapes import Float, Int, Tensor
from tokscale.models.rqtransformer.config import RQSampling
from tokscale.models.rqtransformer.network import HierarchicalNetwork, Stage
from tokscale.nn.conditioning import Context
from tokscale.nn.sampling import SampleStreams, sample_ids


def sample_codes(
    net: HierarchicalNetwork,
    context: Context | None,
    prime: Int[Tensor, "batch primed"],
    options: RQSampling,
    seeds: Sequence[int],
) -> Int[Tensor, "batch image"]:
    """Draw what follows the first codes.

    With guidance, each sample and its twin without a condition go through the network as rows of one batch with one
    cache per stage, so that neither sees the other's entries.
    """
    sampler = _Sampler(net, prime, options, seeds)
    if sampler.guided and context is not None:
        hidden = context.only(torch.zeros_like(context.mask[:, 0]))
        context = Context(torch.cat([context.states, hidden.states]), torch.cat([context.mask, hidden.mask]))
    sampler.fill(0, net.opening(sampler.rows, context), 0)
    return sampler.codes


class _Sampler:
    def __init__(self, net: HierarchicalNetwork, prime: Tensor, options: RQSampling, seeds: Sequence[int]):
        self.net, self.options = net, options
        self.known = prime.shape[1]
        self.guided = options.guided and net.config.condition is not None
        self.rows = len(prime) * (2 if self.guided else 1)
        self.codes = prime.new_zeros(len(prime), math.prod(net.lengths))
        self.codes[:, : self.known] = prime
        drawn = [f"code/{number}" for number in range(self.known, self.codes.shape[1])]
        self.streams = SampleStreams(seeds, drawn, prime.device)
        where = {"device": net.opening.start.device, "dtype": net.opening.start.dtype}
        self.stages = [stage for stage in net.stages if isinstance(stage, Stage)]
        self.caches = [stage.stack.new_cache(self.rows, **where) for stage in self.stages]

    def fill(self, stage: int, opening: Float[Tensor, "rows n dim"], base: int) -> None:
        """Draw all codes below one coarser entry, the first of which is number `base`; keep those that are known."""
        length, inner = self.net.lengths[stage], self.net.lengths[stage + 1 :]
        size = math.prod(inner)
        done = min(max(self.known - base, 0) // size, length)
        cache = self.caches[stage]
        cache.reset()
        x = opening
        if done:
            x = torch.cat([x, self._entries(stage, base, 0, done)], dim=1)
        for at in range(done, length):
            state = self.stages[stage](x, cache)[:, -1]
            if inner:
                self.fill(stage + 1, rearrange(state, "b d -> b 1 d"), base + at * size)
            else:
                self.codes[:, base + at] = self._drawn(self.net.head(state).float(), base + at, at)
            if at + 1 < length:
                x = self._entries(stage, base, at, at + 1)

    def _entries(self, stage: int, base: int, start: int, stop: int) -> Float[Tensor, "rows n dim"]:
        """Embedded entries `[start, stop)` of the sequence whose first code is number `base`."""
        inner = self.net.lengths[stage + 1 :]
        size = math.prod(inner)
        # A running sum needs the codes before, of which there are few.
        first = 0 if self.net.config.cumulative_depth and not inner else start
        codes = self.codes[:, base + first * size : base + stop * size].unflatten(1, (stop - first, *inner))
        codes = torch.cat([codes, codes]) if self.guided else codes
        return self.net.inputs(codes, stage=stage, start=first)[0][:, start - first :]

    def _drawn(self, logits: Float[Tensor, "rows vocab"], number: int, level: int) -> Int[Tensor, " batch"]:
        if self.guided:
            logits = self.options.guide(logits, number, self.codes.shape[1])
        temperature, filter_thres, top_p = self.options.at(level)
        return sample_ids(
            logits,
            self.streams,
            f"code/{number}",
            temperature=temperature,
            filter_thres=filter_thres,
            top_p_mass=top_p,
        )
