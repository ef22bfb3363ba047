"""Views: which samples of a data set to read, as row masks beside the shards. Nothing is rewritten.

A view changes the effective sizes of blocks and so the canonical order; its id is recorded with the data set's.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, NonNegativeInt
from safetensors import SafetensorError, safe_open

from tokscale.base.config import Config
from tokscale.base.errors import DataError
from tokscale.base.files import atomic_write, sha256_file
from tokscale.base.shapes import Int, Tensor
from tokscale.data.tokens.blocks import Block
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.data.tokens.remake import again

FOLDER = "views"


class ViewRule(Config):
    """Which samples a view keeps."""

    min_side: NonNegativeInt = 0
    """Least width and height of the source image, in pixels."""
    max_aspect: NonNegativeFloat | None = None
    """Most that the longer side may be, as a multiple of the shorter."""
    min_caption: NonNegativeInt = 0
    """Least length of a sample's longest caption, in bytes of UTF-8."""
    max_caption: NonNegativeInt | None = None
    """Most length of a sample's longest caption, in bytes of UTF-8."""
    min_scores: dict[str, float] = {}
    """Least value of stored scores by name; a sample without the score is left out."""
    dedupe: bool = False
    """Keep only the first of samples with equal codes."""

    def keeps(self, block: Block) -> NDArray[np.bool_]:
        """Row mask of a block, `dedupe` aside."""
        tensors = block.tensors
        size = tensors["wh"].astype(np.int64)
        kept = size.min(1) >= self.min_side
        if self.max_aspect is not None:
            kept &= size.max(1) <= self.max_aspect * size.min(1)
        if self.min_caption or self.max_caption is not None:
            longest = _longest(block)
            kept &= longest >= self.min_caption
            kept &= longest <= (np.inf if self.max_caption is None else self.max_caption)
        for name, least in self.min_scores.items():
            if f"score.{name}" not in tensors:
                stored = ", ".join(sorted(key[6:] for key in tensors if key.startswith("score."))) or "none"
                raise DataError(f"views: no score {name!r} is stored ({stored}); tokenize with scores=[{name}]")
            kept &= tensors[f"score.{name}"] >= least
        return kept


class RowMask:
    """Some rows of a data set's blocks, under a name for them."""

    def __init__(self, bits: NDArray[np.uint8], starts: NDArray[np.int64], identity: str):
        """The rows whose bit is set; `starts` are the first rows of the blocks, and the end."""
        self.id = identity
        self._bits, self._starts = bits, starts

    @property
    def sizes(self) -> Int[Tensor, "blocks"]:
        """How many rows of each block are kept."""
        kept = np.unpackbits(self._bits, count=int(self._starts[-1]))
        ends = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])[self._starts]
        return torch.from_numpy(np.diff(ends).astype(np.int32))

    def rows(self, block: int) -> NDArray[np.int64]:
        """The rows of a block that are kept, ascending."""
        start, stop = int(self._starts[block]), int(self._starts[block + 1])
        bits = np.unpackbits(self._bits[start // 8 : (stop + 7) // 8])
        return np.flatnonzero(bits[start % 8 : start % 8 + stop - start])

    def within(self, other: "RowMask | None") -> "RowMask":
        """The rows that both keep; these alone where there is no other."""
        if other is None:
            return self
        return RowMask(self._bits & other._bits, self._starts, f"{other.id}/{self.id}")


def block_starts(dataset: TokenDataset) -> NDArray[np.int64]:
    """The first row of each block among all rows of a data set, and the end."""
    return np.concatenate([[0], np.cumsum(dataset.sizes.numpy(), dtype=np.int64)])


class View(RowMask):
    """An open view of a data set."""

    def __init__(self, dataset: TokenDataset, name: str):
        """Open the view `name`.

        Raises:
            DataError: When it does not exist, or was built for other shards.
        """
        path = dataset.files.small(f"{FOLDER}/{name}.safetensors")
        try:
            with safe_open(path, "numpy") as file:
                made_for = (file.metadata() or {}).get("manifest")
                bits: NDArray[np.uint8] = file.get_tensor("kept")
        except (FileNotFoundError, SafetensorError) as error:
            raise DataError(f"{path}: no such view ({error}); define it under `views` of the tokenize stage") from None
        if made_for != dataset.manifest.id:
            raise DataError(
                f"{path}: built for other shards; run {again(dataset.folder, 'action=finalise')} to build it again"
            )
        super().__init__(bits, block_starts(dataset), sha256_file(path))


def build_view(dataset: TokenDataset, name: str, rule: ViewRule) -> Path:
    """Write the view `name`; reads every block once, and with `dedupe` holds 8 bytes per sample.

    Raises:
        DataError: When nothing would be left, or the rule asks for what is not stored.
    """
    masks, hashes = [], []
    for block in dataset.blocks():
        masks.append(rule.keeps(block))
        if rule.dedupe:
            hashes.append(block.tensors["hash"])
    kept = np.concatenate(masks)
    if rule.dedupe:
        candidates = np.flatnonzero(kept)
        first = np.unique(np.concatenate(hashes)[candidates], return_index=True)[1]
        kept = np.zeros_like(kept)
        kept[candidates[first]] = True
    if not kept.any():
        raise DataError(f"{dataset.folder}: the view {name!r} keeps none of {len(kept)} samples; loosen its rule")
    path = dataset.files.beside(f"{FOLDER}/{name}.safetensors")
    # One metadata key only: safetensors writes several in no fixed order, and the file's hash is the view's id.
    metadata = {"manifest": dataset.manifest.id}
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save({"kept": np.packbits(kept)}, metadata))
    with atomic_write(path.with_suffix(".json"), "w") as file:
        json.dump({"rule": rule.model_dump(mode="json"), "samples": int(kept.sum()), "of": len(kept)}, file, indent=2)
    return path


def _longest(block: Block) -> NDArray[np.int64]:
    lengths = np.append(np.diff(block.tensors["cap_off"].astype(np.int64)), 0)
    starts = block.tensors["cap_row"].astype(np.int64)
    longest = np.maximum.reduceat(lengths, starts[:-1])
    return np.where(np.diff(starts) > 0, longest, 0)
