"""The random choices of training, each a function of a sample's position alone, and the masks that follow from them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange

from tokscale.base.rng import mix64, seed_of, uniform_at, uniforms, uniforms_at
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.models.maskgit.config import MaskGitConfig
from tokscale.models.maskgit.schedule import masked_share, training_masked

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as a signed number


@dataclass(frozen=True)
class Draws:
    """What chance decides for one micro batch. Tests put other choices in the place of `sample_training_draws`."""

    times: Float[Tensor, " batch"]
    """Places on the schedule, in [0, 1)."""
    order: Float[Tensor, "batch image"]
    """Which codes are masked: a random permutation by sorting."""
    visible: Float[Tensor, "batch image"]
    """Which codes to predict stay visible, likewise (`no_mask_token_prob`)."""
    keep_condition: Bool[Tensor, " batch"]
    """Which samples the generator is told something about (`cond_drop_prob`)."""
    critic_keep_condition: Bool[Tensor, " batch"]
    """The same for the critic."""
    use_self_cond: Bool[Tensor, " batch"]
    """Which samples' first look is fed back (`self_cond_prob`)."""
    temperatures: Float[Tensor, " batch"]
    """Of the drawings that the critic learns from."""
    gumbel: Callable[[Bool[Tensor, "batch image"] | None, int], Float[Tensor, "*places vocab"]]
    """Noise of those drawings over a codebook of some size: at the places of a mask, in order, or without one at all
    places, `[batch, image, vocab]`."""


def sample_training_draws(
    config: MaskGitConfig, positions: Int[Tensor, " batch"], count: int, *, training: bool
) -> Draws:
    """The choices for the samples at `positions`, of `count` codes each.

    Outside training every sample is told everything; all else is as in training, so that losses compare.
    """
    uniform = lambda name: uniform_at(positions, 0, "maskgit", name)  # noqa: E731
    every = torch.ones_like(positions, dtype=torch.bool)
    temperature = config.sample_temperature
    return Draws(
        times=_times(positions),
        order=uniforms_at(positions, count, 0, "maskgit", "order"),
        visible=uniforms_at(positions, count, 0, "maskgit", "visible"),
        keep_condition=uniform("told") >= config.cond_drop_prob if training else every,
        critic_keep_condition=uniform("critic_told") >= config.cond_drop_prob if training else every,
        use_self_cond=uniform("looked") < config.self_cond_prob,
        temperatures=uniform("temperature") if temperature is None else positions.double() * 0 + temperature,
        gumbel=lambda mask, vocab: _gumbel(positions, count, mask, vocab),
    )


def masks(
    config: MaskGitConfig, draws: Draws, count: int
) -> tuple[Bool[Tensor, "batch image"], Bool[Tensor, "batch image"]]:
    """Which codes are to be predicted, and which of those are hidden."""
    share = masked_share(draws.times, config.noise_schedule, config.schedule_power)
    number = training_masked(share, count, config.min_masking_rate)
    predicted = draws.order.argsort(dim=-1) < rearrange(number, "b -> b 1")
    if not config.no_mask_token_prob:
        return predicted, predicted
    # The first of the predicted ones, in an order of their own, stay visible.
    ranks = draws.visible.masked_fill(~predicted, -1).argsort(dim=-1).argsort(dim=-1)
    first = (~predicted).sum(dim=-1, keepdim=True)
    stay = predicted & (ranks - first < predicted.sum(dim=-1, keepdim=True) * config.no_mask_token_prob)
    return predicted, predicted & ~stay


def _times(positions: Tensor) -> Tensor:
    """Uniform in [0, 1), and spread more evenly than chance over neighbouring positions (a Weyl sequence).

    A batch then has few and many masked codes in the same proportion as the schedule, whatever its size.
    """
    bits = positions.to(torch.int64) * _GOLDEN >> 11 & (1 << 53) - 1
    return bits.to(torch.float64) * 2.0**-53


def _gumbel(positions: Tensor, count: int, mask: Tensor | None, vocab: int) -> Tensor:
    """Noise that belongs to a sample's position, a place and an id, and so to no batch."""
    if mask is None:
        samples, places = positions[:, None], torch.arange(count, device=positions.device)
    else:
        rows, places = mask.nonzero(as_tuple=True)
        samples = positions[rows]
    streams = mix64(samples.to(torch.int64) ^ seed_of(0, "maskgit", "gumbel")) ^ places
    ids = torch.arange(vocab, device=positions.device)
    return -torch.log(-torch.log(uniforms(streams, ids))).float()
