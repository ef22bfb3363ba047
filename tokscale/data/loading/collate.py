"""From stored samples to a batch: a caption and a variant by position, ids by the text tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokscale.base.protocols import TextTokenizer
from tokscale.base.rng import uniform_at
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.data.tokens.blocks import Block


@dataclass(frozen=True)
class Picker:
    """Chooses among what is stored for a sample, by the sample's position alone."""

    seed: int
    caption_weights: Sequence[float] = ()
    """Relative chance of a sample's first, second, ... caption; captions beyond the list count as 1."""

    def captions(self, block: Block, rows: NDArray[np.int64], positions: Int[Tensor, "count"]) -> NDArray[np.int64]:
        """Numbers of the chosen captions in the block; -1 where a sample has none."""
        starts = block.tensors["cap_row"].astype(np.int64)
        first, count = starts[rows], starts[rows + 1] - starts[rows]
        if count.max(initial=0) <= 1:
            return np.where(count > 0, first, -1)
        draw = uniform_at(positions, self.seed, "data", "caption").numpy()
        if not self.caption_weights:
            return np.where(count > 0, first + (draw * count).astype(np.int64), -1)
        most = int(count.max())
        weights = np.array([*self.caption_weights, *[1.0] * most])[:most]
        mass = np.where(np.arange(most) < count[:, None], weights, 0.0).cumsum(1)
        picked = (mass <= draw[:, None] * mass[:, -1:]).sum(1)
        return np.where(count > 0, first + np.minimum(picked, count - 1), -1)

    def variants(self, positions: Int[Tensor, "count"], variants: int) -> NDArray[np.int64]:
        """One of the stored crops and flips for each position."""
        return (uniform_at(positions, self.seed, "data", "variant").numpy() * variants).astype(np.int64)


def pad_ids(
    ragged: Sequence[NDArray[Any]], length: int
) -> tuple[Int[Tensor, "batch text"], Bool[Tensor, "batch text"]]:
    """Right-pad with 0, and say which places are real: what `TextTokenizer.encode` gives."""
    ids = np.zeros((len(ragged), length), np.int64)
    for row, entry in enumerate(ragged):
        ids[row, : len(entry)] = entry
    lengths = torch.tensor([len(entry) for entry in ragged])
    return torch.from_numpy(ids), torch.arange(length) < lengths[:, None]


def pad_states(
    ragged: Sequence[Float[Tensor, "_ width"]],
) -> tuple[Float[Tensor, "batch words width"], Bool[Tensor, "batch words"]]:
    """States of captions as wide as the longest, zero beyond each one's own, and which are real."""
    lengths = torch.tensor([len(states) for states in ragged])
    padded = torch.nn.utils.rnn.pad_sequence(list(ragged), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def encode_captions(
    captions: Sequence[str], tokenizer: TextTokenizer | None, length: int
) -> tuple[Int[Tensor, "batch text"], Bool[Tensor, "batch text"]]:
    """Ids and mask of captions; without a tokenizer, a text of no tokens (unconditional models)."""
    if tokenizer is None:
        return torch.zeros(len(captions), 0, dtype=torch.int64), torch.zeros(len(captions), 0, dtype=torch.bool)
    return tokenizer.encode(captions, length)
