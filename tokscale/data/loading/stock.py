"""The common way: one tar row per sample, written and read by webdataset as its documentation shows.

What `bench data` measures token shards against.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter


def write_stock_rows(path: Path, samples: Iterable[tuple[str, NDArray[Any], str]]) -> None:
    """Write `key.npy` (16-bit codes) and `key.txt` for each sample, with the writer's own defaults."""
    with TarWriter(str(path)) as tar:
        for key, codes, caption in samples:
            tar.write({"__key__": key, "npy": codes.astype(np.uint16), "txt": caption})


def stock_rows(path: Path, batch_size: int, shuffle: bool) -> Iterator[tuple[NDArray[Any], list[str]]]:
    """Batches of codes and captions, shuffled through a buffer of 1000 samples if at all."""
    data: Any = WebDataset(str(path), shardshuffle=False)
    if shuffle:
        data = data.shuffle(1000)
    return cast(Iterator[Any], iter(data.decode().to_tuple("npy", "txt").batched(batch_size)))
