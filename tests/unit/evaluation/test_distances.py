"""Distances of sets of features against torchmetrics and against the textbook's formulas, and what they can see."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from tokscale.base.errors import DataError
from tokscale.base.rng import generator
from tokscale.evaluation import distances
from tokscale.evaluation.distances import (
    diversity,
    frechet_extrapolated,
    inception_score,
    kernel_distance,
    neighbours,
)
from tokscale.evaluation.quality import frechet_distance


def features(name: str, count: int = 137, width: int = 24, shift: float = 0.0) -> torch.Tensor:
    draw = generator(0, "features", name)
    return torch.randn(count, width, generator=draw).double() * torch.linspace(0.5, 2, width) + shift


A, B = features("a"), features("b", count=151, shift=0.3)


def kernel(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def test_the_kernel_distance_is_torchmetrics_of_equal_sets_and_the_formula_of_others():
    same = A[:130], B[:130]
    expected = poly_mmd(*same)
    assert kernel_distance(*same).value == pytest.approx(expected.item(), rel=1e-9)
    x, y = A.numpy(), B.numpy()
    pairs = [
        sum((p @ q / 24 + 1) ** 3 for i, p in enumerate(s) for j, q in enumerate(t) if s is not t or i != j) / n
        for s, t, n in ((x, x, 137 * 136), (y, y, 151 * 150), (x, y, 137 * 151))
    ]
    assert kernel_distance(A, B).value == pytest.approx(pairs[0] + pairs[1] - 2 * pairs[2], rel=1e-6)


def test_the_error_of_the_kernel_distance_is_that_of_repeated_draws():
    """Sets of one distribution: within two errors of zero, about as often as a normal distribution says."""
    found = [kernel_distance(features(f"x{n}", 200), features(f"y{n}", 200)) for n in range(60)]
    spread = np.std([estimate.value for estimate in found])
    assert spread == pytest.approx(np.mean([estimate.error for estimate in found]), rel=0.35)
    assert sum(abs(estimate.value) < 2 * estimate.error for estimate in found) >= 52
    moved = kernel_distance(features("x", 200), features("y", 200, shift=0.5))
    assert moved.value > 4 * moved.error


def test_chunks_are_no_part_of_a_result():
    a, b = features("long a", 1203, 8), features("long b", 1111, 8, 0.1)
    assert kernel_distance(a, b).value == pytest.approx(
        (
            (kernel(a, a).sum() - kernel(a, a).diagonal().sum()) / (1203 * 1202)
            + (kernel(b, b).sum() - kernel(b, b).diagonal().sum()) / (1111 * 1110)
            - 2 * kernel(a, b).mean()
        ).item(),
        rel=1e-9,
    )
    found, slow = neighbours(a, b), neighbours_slowly(a.numpy(), b.numpy(), 5)
    assert found == pytest.approx(slow, abs=1e-9)


def neighbours_slowly(real, drawn, k):
    """As the papers write it."""

    def apart(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    reach_real, reach_drawn = np.sort(apart(real, real), 1)[:, k], np.sort(apart(drawn, drawn), 1)[:, k]
    both = apart(real, drawn)
    return {
        "precision": (both <= reach_real[:, None]).any(0).mean(),
        "recall": (both <= reach_drawn[None]).any(1).mean(),
        "density": (both <= reach_real[:, None]).sum() / (k * len(drawn)),
        "coverage": (both.min(1) <= reach_real).mean(),
    }


def test_neighbours_are_those_of_the_papers_and_see_a_collapse():
    assert neighbours(A, B, 3) == pytest.approx(neighbours_slowly(A.numpy(), B.numpy(), 3), abs=1e-12)
    real = features("real", 400, 6)
    repeated = features("drawn", 20, 6).repeat(20, 1)
    whole, collapsed = neighbours(real, features("drawn", 400, 6)), neighbours(real, repeated)
    assert whole["recall"] > 0.9 > 0.3 > collapsed["recall"] and collapsed["coverage"] < 0.3
    assert collapsed["precision"] > 0.8  # which alone would say that all is well


def test_the_extrapolated_distance_removes_what_few_samples_add():
    real, drawn = features("r", 8000, 16), features("d", 800, 16)
    plain, shifted = frechet_distance(real, drawn), frechet_distance(real, drawn + 1)
    assert abs(frechet_extrapolated(real, drawn)) < 0.6 * plain
    assert frechet_extrapolated(real, drawn + 1) == pytest.approx(shifted - plain, rel=0.02)


def test_the_inception_score_counts_classes():
    sure = torch.eye(10).repeat(5, 1) * 100
    assert inception_score(sure) == pytest.approx(10, rel=1e-6)
    assert inception_score(sure[:1].repeat(9, 1)) == pytest.approx(1, rel=1e-6)
    from torchmetrics.functional import kl_divergence

    logits = features("logits", 60, 7)
    p = logits.softmax(-1)
    expected = math.exp(kl_divergence(p, p.mean(0, keepdim=True).expand_as(p)).item())
    assert inception_score(logits) == pytest.approx(expected, rel=1e-6)


def test_diversity_tells_one_image_for_each_prompt_from_many():
    base = features("prompts", 6, 12)
    spread = base.repeat_interleave(4, 0) + features("noise", 24, 12)
    names = [f"prompt {n}" for n in range(6) for _ in range(4)]
    assert diversity(base.repeat_interleave(4, 0), names)["within_prompt"] == pytest.approx(0, abs=1e-9)
    found = diversity(spread, names)
    assert 0 < found["within_prompt"] < found["between_prompts"]
    with pytest.raises(DataError, match="per_prompt"):
        diversity(base, names[::4])


def test_too_few_are_refused():
    with pytest.raises(DataError, match=f"at least {2 * distances._GROUPS}"):
        kernel_distance(A[:20], B)
    with pytest.raises(DataError, match="have no 5 neighbours"):
        neighbours(A[:5], B)
