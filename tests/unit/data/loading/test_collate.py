"""Which caption of a sample is taken, and how texts of unlike lengths become one tensor."""

import numpy as np
import pytest
import torch

from tokscale.data.loading.collate import Picker, pad_ids, pad_states
from tokscale.data.tokens.blocks import Block


def block(*counts: int) -> Block:
    """Samples with so many captions each."""
    return Block({"cap_row": np.cumsum([0, *counts]).astype(np.uint32)})


@pytest.mark.parametrize("more", [0, 3])
def test_a_sample_without_captions_has_none_whatever_the_others_have(more):
    stored = block(1, 0, 1, more)
    rows = np.array([0, 1, 2, 1])
    for weights in ((), (2.0, 1.0)):
        found = Picker(0, weights).captions(stored, np.append(rows, 3), torch.arange(5))
        assert found[:4].tolist() == [0, -1, 1, -1]
        assert (found[4] == -1) == (more == 0)


def test_each_caption_is_taken_as_often_as_its_weight_says():
    stored, rows = block(3), np.zeros(3000, np.int64)
    for weights, shares in (((), (1, 1, 1)), ((2.0,), (2, 1, 1)), ((1.0, 0.0, 3.0), (1, 0, 3))):
        taken = np.bincount(Picker(4, weights).captions(stored, rows, torch.arange(3000)), minlength=3)
        assert taken.sum() == 3000
        assert np.abs(taken / 3000 - np.array(shares) / sum(shares)).max() < 0.04


def test_ids_and_states_are_padded_behind_their_end():
    ids, real = pad_ids([np.array([5, 6], np.uint16), np.array([], np.uint16), np.array([7, 8, 9], np.uint16)], 3)
    assert ids.tolist() == [[5, 6, 0], [0, 0, 0], [7, 8, 9]]
    assert real.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    states, real = pad_states([torch.ones(1, 2), torch.full((3, 2), 2.0)])
    assert states[0].tolist() == [[1, 1], [0, 0], [0, 0]] and real.tolist() == [[True, False, False], [True] * 3]
