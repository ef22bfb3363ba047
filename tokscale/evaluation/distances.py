"""How far apart two sets of images are, by what a network sees in them, and what each of the two lacks.

A Fréchet distance of fewer samples than features has no meaning as a level; a kernel distance has, with its error. Both
are nearly blind to a model that draws the same few images again and again; recall and coverage are not.
"""

import math
from dataclasses import dataclass

import torch

from tokscale.base.errors import DataError
from tokscale.base.rng import generator
from tokscale.base.shapes import Float, Tensor
from tokscale.evaluation.quality import frechet_distance

ENOUGH_FOR_FD = 5000
"""Fewer samples than these, and a Fréchet distance says little as a level."""
_GROUPS = 20
LEAST_FOR_KID = 2 * _GROUPS
"""Images of each set without which a kernel distance has no error."""
_SIZES = 8

Features = Float[Tensor, "samples width"]
Others = Float[Tensor, "others width"]


@dataclass(frozen=True)
class Estimate:
    """A number and how far it may be off."""

    value: float
    error: float
    """One standard error."""


def kernel_distance(a: Features, b: Others) -> Estimate:
    """Squared maximum mean discrepancy under the kernel `(x.y / width + 1)^3`, unbiased: KID (Bińkowski et al. 2018).

    The error is a jackknife's over groups of samples of both sets, so that sets of the same distribution lie within
    twice of it from zero in 95 of 100 cases; smaller than the spread of subsets that some libraries give.

    Raises:
        DataError: When a set has fewer than `LEAST_FOR_KID` samples.
    """
    if min(len(a), len(b)) < LEAST_FOR_KID:
        raise DataError(f"a kernel distance of {len(a)} and {len(b)} images; give at least {LEAST_FOR_KID} of each")
    a, b = a.double(), b.double()
    own_a, own_b, cross = _sums(a, a, without_diagonal=True), _sums(b, b, without_diagonal=True), _sums(a, b)
    sizes_a, sizes_b = (torch.bincount(torch.arange(len(x)) % _GROUPS, minlength=_GROUPS).double() for x in (a, b))

    def distance(kept: Tensor) -> float:
        m, n = (kept * sizes_a).sum(), (kept * sizes_b).sum()
        within = kept @ own_a @ kept / (m * (m - 1)) + kept @ own_b @ kept / (n * (n - 1))
        return (within - 2 * (kept @ cross @ kept) / (m * n)).item()

    every = torch.ones(_GROUPS, dtype=torch.float64)
    without = torch.tensor([distance(every - group) for group in torch.eye(_GROUPS, dtype=torch.float64)])
    spread = (without - without.mean()).square().sum() * (_GROUPS - 1) / _GROUPS
    return Estimate(distance(every), spread.sqrt().item())


def _sums(a: Tensor, b: Tensor, *, without_diagonal: bool = False) -> Float[Tensor, "groups others"]:
    """The kernel, summed over pairs of groups; sample number i is of group `i % _GROUPS`."""
    found = torch.zeros(_GROUPS, _GROUPS, dtype=torch.float64)
    groups = torch.arange(len(b)) % _GROUPS
    for start in range(0, len(a), 500):
        kernel = (a[start : start + 500] @ b.T / a.shape[1] + 1) ** 3
        if without_diagonal:
            rows = torch.arange(len(kernel))
            kernel[rows, rows + start] = 0
        columns = torch.zeros(len(kernel), _GROUPS, dtype=torch.float64).index_add_(1, groups, kernel)
        found.index_add_(0, torch.arange(start, start + len(kernel)) % _GROUPS, columns)
    return found


def frechet_extrapolated(real: Features, drawn: Others, seed: int = 0) -> float:
    """The Fréchet distance that infinitely many drawn samples would have: FD-infinity (Chong & Forsyth 2020).

    A line through the distances of subsets over 1 / their size, at 0. The real samples stay as they are.
    """
    order = torch.randperm(len(drawn), generator=generator(seed, "frechet subsets"))
    sizes = torch.linspace(len(drawn) / 4, len(drawn), _SIZES).int().clamp(min=2).tolist()
    values = [frechet_distance(real, drawn[order[:size]]) for size in sizes]
    places = torch.tensor([[1.0, 1 / size] for size in sizes], dtype=torch.float64)
    line = torch.linalg.lstsq(places, torch.tensor(values, dtype=torch.float64)[:, None]).solution
    return line[0].item()


def inception_score(logits: Float[Tensor, "samples classes"]) -> float:
    """The exponent of the mutual information of image and class (Salimans et al. 2016), over all samples at once."""
    each = logits.double().log_softmax(-1)
    mean = each.exp().mean(0).log()
    return math.exp((each.exp() * (each - mean)).sum(-1).mean().item())


def neighbours(real: Features, drawn: Others, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), by k nearest ones.

    `precision`: share of drawn samples within the reach of a real one, the distance to its k-th neighbour among the
    real; `recall`: the same with the roles exchanged; `density`: by how many of them, over k; `coverage`: share of real
    samples that have a drawn one within reach.

    Raises:
        DataError: When a set has no more than `k` samples.
    """
    if min(len(real), len(drawn)) <= k:
        raise DataError(f"{len(real)} real and {len(drawn)} drawn images have no {k} neighbours; give more")
    real, drawn = real.double(), drawn.double()
    reach_real, reach_drawn = _reach(real, k), _reach(drawn, k)
    inside, recalled, nearest = 0, torch.zeros(len(real), dtype=torch.bool), torch.full((len(real),), math.inf).double()
    precise = 0
    for start in range(0, len(drawn), 500):
        apart = torch.cdist(real, drawn[start : start + 500])
        within = apart <= reach_real[:, None]
        inside += int(within.sum())
        precise += int(within.any(0).sum())
        recalled |= (apart <= reach_drawn[None, start : start + 500]).any(1)
        nearest = torch.minimum(nearest, apart.amin(1))
    return {
        "precision": precise / len(drawn),
        "recall": recalled.double().mean().item(),
        "density": inside / (k * len(drawn)),
        "coverage": (nearest <= reach_real).double().mean().item(),
    }


def _reach(x: Tensor, k: int) -> Float[Tensor, " samples"]:
    """From each sample to its k-th neighbour."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(500)])


def diversity(features: Features, groups: list[str]) -> dict[str, float]:
    """Mean cosine distance of pairs drawn for one prompt, and of pairs of different prompts: what variety there is.

    Raises:
        DataError: When no prompt has two samples.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([numbers[name] for name in groups])
    apart, same = 1 - unit @ unit.T, group[:, None] == group
    own = same & ~torch.eye(len(group), dtype=torch.bool)
    if not own.any():
        raise DataError("diversity within a prompt needs several images of one; give per_prompt=2 or more")
    others = apart[~same].mean().item() if not bool(same.all()) else math.nan
    return {"within_prompt": apart[own].mean().item(), "between_prompts": others}
