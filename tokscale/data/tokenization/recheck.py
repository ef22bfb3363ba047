"""Do the stored ids still mean the images: encode some again, and decode some for visual inspection."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tokscale.base.errors import DataError
from tokscale.base.rng import mix64
from tokscale.base.shapes import Int, Tensor, UInt8
from tokscale.data.raw.shards import RawShard
from tokscale.data.tokenization.inputs import PreparedImage, fetch, make_image, shape_of
from tokscale.data.tokenization.memory import Stacker
from tokscale.data.tokenization.plan import Plan
from tokscale.data.tokenization.recipe import Recipe
from tokscale.data.tokens.blocks import Block
from tokscale.data.tokens.manifest import CODES


@dataclass(frozen=True)
class Agreement:
    """How many ids came out equal when images were encoded again."""

    images: int
    equal: int
    ids: int
    missing: tuple[str, ...]
    """Samples that can no longer be read as they were."""

    @property
    def share(self) -> float:
        """Of equal ids; 1 when nothing was compared."""
        return self.equal / self.ids if self.ids else 1.0


def chosen_blocks(sizes: Sequence[int], samples: int, seed: int) -> list[int]:
    """Blocks by hash, until they hold so many samples."""
    order = mix64(torch.arange(len(sizes)) ^ seed).argsort().tolist()
    found, held = [], 0
    for number in order:
        if held >= samples:
            break
        found.append(number)
        held += sizes[number]
    return found


def agreement(blocks: Iterator[Block], recipe: Recipe, plan: Plan, samples: int, device: torch.device) -> Agreement:
    """Encode the images of stored samples again.

    Args:
        blocks: Where the samples are stored.
        recipe: How they were made.
        plan: Which inputs they came from.
        samples: How many to compare.
        device: Of the tokenizers.
    """
    shards, stacker = _Shards(recipe, plan), Stacker(recipe.encode_batch, device)
    compared = equal = ids = 0
    missing: list[str] = []
    per_batch = recipe.encode_batch // recipe.variants.count
    for block, rows in _batches(blocks, per_batch, samples):
        images = [shards.image(block, row) for row in rows.tolist()]
        good = [image for image in images if isinstance(image, PreparedImage)]
        missing += [image for image in images if isinstance(image, str)]
        kept = rows[[isinstance(image, PreparedImage) for image in images]]
        compared += len(rows)
        if not good:
            continue
        for name, tokenizer in recipe.tokenizers.items():
            shape = shape_of(tokenizer)
            pixels = stacker.stack([image.pixels[shape] for image in good])
            again = tokenizer.encode(pixels)[: len(good) * recipe.variants.count].cpu().numpy()
            stored = block.tensors[name][kept].astype(np.int64)
            equal += int((again.reshape(stored.shape) == stored).sum())
            ids += stored.size
    return Agreement(compared, equal, ids, tuple(missing))


def contact_sheet(
    blocks: Iterator[Block], recipe: Recipe, samples: int
) -> tuple[UInt8[Tensor, "batch channels height width"], list[str]]:
    """Decoded images and their captions, for visual inspection."""
    tokenizer = recipe.tokenizers[CODES]
    pixels, captions = [], []
    for block, rows in _batches(blocks, recipe.encode_batch, samples):
        pixels.append(tokenizer.decode(_first_variant(block, rows, recipe.variants.count)).cpu())
        captions += [(block.captions(row) or [""])[0] for row in rows.tolist()]
    return torch.cat(pixels), captions


def _batches(blocks: Iterator[Block], size: int, samples: int) -> Iterator[tuple[Block, NDArray[np.int64]]]:
    """The first `samples` rows of all blocks, at most `size` at a time."""
    for block in blocks:
        for start in range(0, min(len(block), samples), size):
            yield block, np.arange(start, min(start + size, len(block), samples))
        samples -= min(len(block), samples)


def _first_variant(block: Block, rows: NDArray[np.int64], variants: int) -> Int[Tensor, "batch *code_shape"]:
    codes = block.tensors[CODES][rows]
    return torch.from_numpy((codes[:, 0] if variants > 1 else codes).astype(np.int64))


class _Shards:
    """Raw shards by their number in the plan; neighbours mostly come from the same one, so that one stays open."""

    def __init__(self, recipe: Recipe, plan: Plan):
        self._recipe, self._plan = recipe, plan
        self._last: tuple[int, RawShard] | None = None

    def image(self, block: Block, row: int) -> PreparedImage | str:
        """The image of a stored sample, or why it cannot be had."""
        ordinal, place = block.tensors["src"][row].tolist()
        key = block.keys(np.array([row]))[0]
        try:
            if self._last is None or self._last[0] != ordinal:
                self._last = ordinal, self._recipe.raw.open(self._plan.inputs[ordinal].path)
            fetched = fetch(self._recipe, self._last[1], (ordinal, place))
        except (DataError, IndexError) as error:
            return f"{key}: {error}"
        made = make_image(fetched, self._recipe)
        if not isinstance(made, PreparedImage) or made.key != key:
            return f"{key}: is {made.key!r} now"
        return made
