"""What says of each code whether it is out of place: a transformer of its own, or one more output of the generator."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.models.grids import Grid
from tokscale.models.maskgit.layers import Memory
from tokscale.models.maskgit.network import Transformer
from tokscale.nn.conditioning import Context


class SelfCritic(nn.Module):
    """One more output on the generator's hidden states. The generator is not part of it: its weights exist once."""

    def __init__(self, dim: int):
        super().__init__()
        self.to_pred = nn.Linear(dim, 1)

    def forward(self, hidden: Float[Tensor, "batch image dim"]) -> Float[Tensor, "batch image"]:
        """Logits, larger where a code looks wrong."""
        return rearrange(self.to_pred(hidden), "b n 1 -> b n")


def critic_logits(
    critic: Transformer | SelfCritic,
    generator: Transformer,
    ids: Int[Tensor, "batch image"],
    context: Context | list[Memory],
    grid: Grid | None = None,
) -> Float[Tensor, "batch image"]:
    """The critic's logits for whole images.

    Args:
        critic: The one or the other.
        generator: Whose hidden states a `SelfCritic` reads.
        ids: Codes, none of them masked.
        context: Of the critic's own, or for a `SelfCritic` of the generator's.
        grid: Of the images, where it is not the largest.
    """
    if isinstance(critic, SelfCritic):
        return critic(generator(ids, context, grid=grid))
    return rearrange(critic.to_logits(critic(ids, context, grid=grid)), "b n 1 -> b n")


def critic_loss(
    logits: Float[Tensor, "batch image"], wrong: Float[Tensor, "batch image"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Binary cross-entropy over all codes, and the share of codes judged rightly."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), wrong)
    return loss, ((logits > 0) == (wrong > 0)).float().mean()


def critic_input(
    codes: Int[Tensor, "batch image"],
    masked: Int[Tensor, "batch image"],
    drawn: Int[Tensor, "batch image"],
    hidden: Bool[Tensor, "batch image"],
) -> tuple[Int[Tensor, "batch image"], Float[Tensor, "batch image"]]:
    """Images with the generator's drawings at the hidden places, and 1 where they differ from the true ones.

    Args:
        codes: The true codes.
        masked: What the generator saw.
        drawn: Its drawings, at the hidden places at least.
        hidden: What was hidden from it.
    """
    filled = torch.where(hidden, drawn, masked)
    return filled, (filled != codes).float()
