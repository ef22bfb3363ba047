"""The shapes that signatures promise are checked while the tests run."""

import jaxtyping
import pytest
import torch

from tokscale.base.batch import TokenBatch
from tokscale.base.rng import uniform_at


def test_a_wrong_dtype_or_rank_is_caught():
    with pytest.raises(jaxtyping.TypeCheckError):
        uniform_at(torch.zeros(3), 0, "test")
    with pytest.raises(jaxtyping.TypeCheckError):
        uniform_at(torch.zeros(3, 2, dtype=torch.int64), 0, "test")


def test_axes_of_one_batch_must_agree():
    with pytest.raises(jaxtyping.TypeCheckError):
        TokenBatch(
            positions=torch.arange(4),
            text=torch.ones(4, 6, dtype=torch.int64),
            text_mask=torch.ones(3, 6, dtype=torch.bool),
            codes=torch.ones(4, 5, dtype=torch.int64),
        )
