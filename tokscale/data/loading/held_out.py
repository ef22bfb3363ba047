"""Which samples training never sees: a share by the hash of their keys, so that no order and no shard decides."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open

from tokscale.base.config import Config, PathKey
from tokscale.base.errors import DataError, StorageError
from tokscale.base.files import atomic_write
from tokscale.base.log import logger
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.data.tokens.views import FOLDER, RowMask, block_starts

log = logger("data")


class SplitConfig(Config):
    """Which samples are held out from training, to measure on."""

    share: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the samples that training never sees, chosen by the hash of their keys: the same ones whatever the
    seed, the order or the shards. 0 holds none out. Part of the data order: a run keeps what it began with."""
    path: PathKey | None = None
    """A folder of samples of their own instead, which training does not read anyway: token shards, for models that
    train on images raw ones."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "SplitConfig":
        if self.share and self.path is not None:
            raise ValueError(f"share={self.share:g} and path={self.path}: give one of them")
        return self


def is_held_out(key: str, share: float) -> bool:
    """Whether a share of all keys, by hash, has this one among it; a larger share has all of a smaller one."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def held_out_flags(keys: Sequence[str], share: float) -> NDArray[np.bool_]:
    """`is_held_out` of many."""
    return np.fromiter((is_held_out(key, share) for key in keys), np.bool_, len(keys))


class Split:
    """A data set in two: what is trained on, and what is held out."""

    def __init__(self, dataset: TokenDataset, share: float, *, some: bool = True):
        """Read every key of the data set, or what an earlier reading left beside its shards.

        Args:
            dataset: Opened.
            share: Of its samples.
            some: Refuse to hold out none; false for one of several shapes of images, which may be rare.

        Raises:
            DataError: When one of the two would be empty, or a block is damaged.
        """
        flags = _stored(dataset, share)
        if flags is None:
            flags = np.concatenate(
                [held_out_flags(block.keys(np.arange(len(block))), share) for block in dataset.blocks()]
            )
            _store(dataset, share, flags)
        if flags.all() or (some and not flags.any()):
            raise DataError(
                f"{dataset.folder}: data.held_out.share={share:g} holds {int(flags.sum())} of {len(flags)} samples "
                "out; choose another share, or 0 to hold none out"
            )
        starts = block_starts(dataset)
        self.trained = RowMask(np.packbits(~flags), starts, f"without {share!r} held out")
        self.held_out = RowMask(np.packbits(flags), starts, f"{share!r} held out")


def _file(dataset: TokenDataset, share: float) -> Path:
    return dataset.files.beside(f"{FOLDER}/held_out-{share!r}.safetensors")


def _stored(dataset: TokenDataset, share: float) -> NDArray[np.bool_] | None:
    try:
        with safe_open(_file(dataset, share), "numpy") as file:
            if (file.metadata() or {}).get("manifest") != dataset.manifest.id:
                return None
            bits = file.get_tensor("held_out")
    except (FileNotFoundError, SafetensorError):
        return None
    return np.unpackbits(bits, count=int(dataset.sizes.sum())).astype(np.bool_)


def _store(dataset: TokenDataset, share: float, flags: NDArray[np.bool_]) -> None:
    """So that the next run need not read every block; a folder that cannot be written costs just that."""
    path = _file(dataset, share)
    try:
        with atomic_write(path) as file:
            file.write(safetensors.numpy.save({"held_out": np.packbits(flags)}, {"manifest": dataset.manifest.id}))
    except (OSError, StorageError) as error:
        log.warning("%s: cannot be kept (%s); every start reads all keys again", path, error)
