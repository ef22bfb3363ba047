"""Logits to ids: pure functions, in float32 whatever the logits are.

Pass the legal slice of a vocabulary: a fraction of ids that cannot be drawn filters nothing.
"""

from collections.abc import Sequence

import torch

from tokscale.base.rng import seed_of, uniforms
from tokscale.base.shapes import Float, Int, Tensor


def top_k(logits: Float[Tensor, "*batch vocab"], thres: float = 0.5) -> Float[Tensor, "*batch vocab"]:
    """Keep the largest `1 - thres` of the ids (at least one), the rest becomes -inf. 0 keeps all."""
    count = max(int((1 - thres) * logits.shape[-1]), 1)
    values, indices = logits.topk(count, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def top_p(logits: Float[Tensor, "*batch vocab"], mass: float) -> Float[Tensor, "*batch vocab"]:
    """Keep the fewest most likely ids that hold at least `mass` of the probability, the rest becomes -inf."""
    ordered, indices = logits.sort(dim=-1, descending=True)
    probabilities = ordered.float().softmax(dim=-1)
    beyond = probabilities.cumsum(dim=-1) - probabilities >= mass
    beyond[..., 0] = False  # one id stays, whatever the mass and the rounding
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, ordered.masked_fill(beyond, -torch.inf))


def guide(
    conditional: Float[Tensor, "*batch vocab"], null: Float[Tensor, "*batch vocab"], scale: float
) -> Float[Tensor, "*batch vocab"]:
    """Classifier-free guidance: away from the null logits, `scale` times the way to the conditional ones."""
    return null + (conditional - null) * scale


class SampleStreams:
    """The random streams of some draws of each sample, made before the first one.

    A draw then copies nothing from the host, which would hold a GPU up at every code.

    Args:
        seeds: One a sample.
        steps: Names the draws within a sample.
        device: Where to draw.
    """

    def __init__(self, seeds: Sequence[int], steps: Sequence[int | str], device: torch.device | str = "cpu") -> None:
        self._rows = {step: row for row, step in enumerate(steps)}
        numbers = [[seed_of(seed, "sample", step) for seed in seeds] for step in steps]
        self._streams = torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device)

    def at(self, step: int | str | Int[Tensor, "1"]) -> Int[Tensor, "batch"]:
        """The stream of each sample's draw, by its name or by its number among `steps`."""
        if isinstance(step, Tensor):
            return self._streams.index_select(0, step)[0]
        return self._streams[self._rows[step]]

    def noise(self, step: int | str | Int[Tensor, "1"], vocab: int) -> Float[Tensor, "batch vocab"]:
        """Gumbel noise of a draw; see `sample_noise`."""
        ids = torch.arange(vocab, dtype=torch.int64, device=self._streams.device)
        return -torch.log(-torch.log(uniforms(self.at(step), ids))).float()


def sample_noise(
    seeds: Sequence[int], step: int | str, vocab: int, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "batch vocab"]:
    """Gumbel noise for one step of each sample: a function of the sample's own seed, `step` and the id alone.

    So a prompt and a seed give the same image alone, in a batch, and on any device.
    """
    return SampleStreams(seeds, [step], device).noise(step, vocab)


def gumbel_sample(
    logits: Float[Tensor, "*batch vocab"],
    temperature: float = 1.0,
    noise: Float[Tensor, "*batch vocab"] | None = None,
) -> Int[Tensor, "*batch"]:
    """Draw ids with probabilities softmax(logits / temperature); temperature 0 takes the most likely.

    Args:
        logits: Of any float type; ids at -inf are never drawn.
        temperature: At least 0.
        noise: From `sample_noise`. None draws from torch's default generator.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    if noise is None:
        noise = -torch.log(torch.empty_like(logits).exponential_())
    return (logits / temperature + noise.float()).argmax(dim=-1)


def sample_ids(
    logits: Float[Tensor, "batch vocab"],
    streams: SampleStreams,
    step: int | str | Int[Tensor, "1"],
    *,
    temperature: float = 1.0,
    filter_thres: float = 0.0,
    top_p_mass: float = 1.0,
) -> Int[Tensor, " batch"]:
    """One id per row: what is unlikely is filtered, and the rest drawn with the row's own noise.

    Args:
        logits: Of the ids that can follow.
        streams: Of the rows' samples; know `step`.
        step: Names the draw within a sample, or is its number.
        temperature: 0 takes the most likely.
        filter_thres: See `top_k`.
        top_p_mass: See `top_p`; 1 keeps all.
    """
    if temperature == 0:
        return gumbel_sample(logits, 0)
    logits = top_k(logits, filter_thres)
    if top_p_mass < 1:
        # What is likely depends on the temperature that the draw is made at.
        logits = top_p(logits / temperature, top_p_mass) * temperature
    return gumbel_sample(logits, temperature, streams.noise(step, logits.shape[-1]))
