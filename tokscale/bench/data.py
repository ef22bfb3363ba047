"""`bench data`: token shards beside stock webdataset over one tar row per sample, and what order and resume cost.

Both sides hold the same codes and captions on the same disk, are read in one process, and are compared by CPU time.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from tokscale.base.config import Config, PathKey
from tokscale.bench.measure import peak_bytes, resident_bytes, row
from tokscale.data.loading import TokenLoader, TokenLoaderConfig
from tokscale.data.loading.order import BlockOrder
from tokscale.data.loading.stock import stock_rows, write_stock_rows
from tokscale.data.tokens.blocks import ShardRecord, ShardWriter, TokenSample, code_dtype, pack
from tokscale.data.tokens.manifest import CODES, StreamRecord, TokenDataset, write_manifest

_WORDS = ("a", "large", "red", "circle", "left", "of", "small", "blue", "square", "above", "green", "photo", "tree")


class DataBench(Config):
    """What `bench data` measures with."""

    samples: int = Field(default=50_000, ge=100)
    """Samples that are written and read."""
    codes: int = Field(default=256, ge=1)
    """Codes of a sample."""
    num_tokens: int = Field(default=8192, ge=2)
    """Vocabulary."""
    batch_size: int = Field(default=256, ge=1)
    """Samples of a batch, on both sides."""
    stock_samples: int = Field(default=10_000, ge=100)
    """Samples that stock webdataset reads in a round: it takes long."""
    resume_samples: int = Field(default=10_000_000, ge=1000)
    """Size of the data set in whose middle a run resumes; its index is real, its blocks repeat the smaller one's."""
    order_samples: int = Field(default=1_000_000_000, ge=1000)
    """Size of the data set whose order is made, in blocks of 256."""
    memory_samples: int = Field(default=1_000_000, ge=100)
    """Samples after which memory should not have grown."""
    rounds: int = Field(default=3, ge=1)
    """Measurements of each side; the best counts."""
    folder: PathKey | None = None
    """Where to write; by default the system's temporary folder."""


CONFIG = DataBench


def rows(config: DataBench) -> Iterator[dict[str, Any]]:
    """The rows of the report, each as soon as it is measured."""
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        samples = list(_samples(config))
        records = _write_blocks(folder / "tokens", config, samples)
        write_stock_rows(folder / "rows.tar", ((s.key, s.codes[CODES], s.captions[0]) for s in samples))
        ours, stock = _block_bytes(records), (folder / "rows.tar").stat().st_size
        size = f"{config.samples / 1000:g}k-x-{config.codes}"
        del samples
        yield from _reading(config, folder, size)
        yield row(f"data/bytes/{size}/vs-webdataset/memory", ours, stock, "bytes", 4.0)
        yield from _resuming(config, folder, records)
        yield from _ordering(config)
        yield _flat_memory(config, folder)


def _samples(config: DataBench) -> Iterator[TokenSample]:
    values = np.random.default_rng(0)
    for number in range(config.samples):
        words = values.integers(0, len(_WORDS), 12)
        yield TokenSample(
            key=f"{number:09d}",
            captions=[" ".join(_WORDS[word] for word in words)],
            codes={CODES: values.integers(0, config.num_tokens, config.codes)},
            source=(0, number),
            size=(256, 256),
            crop=np.zeros(4, np.float32),
        )


def _write_blocks(folder: Path, config: DataBench, samples: list[TokenSample]) -> list[ShardRecord]:
    folder.mkdir()
    with open(folder / "tokens-000000.tar", "wb") as file:
        writer = ShardWriter(file, {})
        for start in range(0, len(samples), 256):
            block = samples[start : start + 256]
            writer.add(pack(block, {CODES: code_dtype(config.num_tokens)}), len(block))
        records = [writer.finish("tokens-000000.tar")]
    _close(folder, config, records)
    return records


def _close(folder: Path, config: DataBench, records: list[ShardRecord]) -> None:
    stream = StreamRecord(tokenizer="bench", num_tokens=config.num_tokens, code_shape=(config.codes,), image_size=256)
    write_manifest(folder, records, run="bench", streams={CODES: stream})


def _block_bytes(records: list[ShardRecord]) -> int:
    return sum(record.bytes for record in records)


def _reading(config: DataBench, folder: Path, size: str) -> list[dict[str, Any]]:
    """Samples per second of CPU time, codes as int64 tensors and captions as text."""
    dataset = TokenDataset(folder / "tokens")
    found = []
    for case, target in (("shuffled", 20.0), ("sequential", 70.0)):
        shuffle = case == "shuffled"
        ours = _best(config, config.samples, lambda shuffle=shuffle: _read(config, dataset, shuffle))
        stock = _best(
            config,
            config.stock_samples,
            lambda shuffle=shuffle: _drain(stock_rows(folder / "rows.tar", config.batch_size, shuffle), config),
        )
        name = f"data/{case}/{size}/vs-webdataset/time"
        found.append(row(name, ours, stock, "samples/s", target, more_is_better=True))
    return found


def _loader(config: DataBench, dataset: TokenDataset, shuffle: bool = True) -> TokenLoader:
    settings = TokenLoaderConfig(shuffle=shuffle, prefetch=0)
    return TokenLoader(settings, manifests=[dataset], text_tokenizer=None, batch_size=config.batch_size, seed=0)


def _read(config: DataBench, dataset: TokenDataset, shuffle: bool) -> None:
    loader = _loader(config, dataset, shuffle)
    for start in range(0, config.samples - config.batch_size + 1, config.batch_size):
        stored = loader.read(start, start + config.batch_size)
        torch.from_numpy(stored.codes[CODES]).to(torch.int64)


def _drain(batches: Iterator[tuple[NDArray[Any], list[str]]], config: DataBench) -> None:
    read = 0
    for codes, _ in batches:
        torch.from_numpy(codes).to(torch.int64)
        read += len(codes)
        if read >= config.stock_samples:
            return


def _best(config: DataBench, samples: int, call: Callable[[], None]) -> float:
    """Samples per second of CPU time, the best of the rounds after one that is not counted."""
    best = 0.0
    for number in range(config.rounds + 1):
        began = time.process_time()
        call()
        taken = time.process_time() - began
        best = max(best, samples / taken) if number else 0.0
    return best


def _resuming(config: DataBench, folder: Path, records: list[ShardRecord]) -> list[dict[str, Any]]:
    """Time to the first batch, of a data set whose index names the same blocks again and again."""
    repeats = -(-config.resume_samples // records[0].samples)
    large = folder / "large"
    large.mkdir()
    (large / records[0].file).symlink_to(folder / "tokens" / records[0].file)
    _close(large, config, records * repeats)
    dataset = TokenDataset(large)
    order = min(_seconds(lambda: BlockOrder(dataset.sizes, seed=0).locate(0, 1)) for _ in range(config.rounds))

    def resume(position: int) -> float:
        loader = _loader(config, dataset)
        loader.load_state_dict(loader.state_dict() | {"position": position})
        return _seconds(loader.next_batch)

    at_start, middle = (
        min(resume(position) for _ in range(config.rounds)) for position in (0, dataset.samples // 2 + 77)
    )
    stock = _seconds(lambda: _drain(stock_rows(folder / "rows.tar", config.batch_size, False), config))
    skipped = stock / config.stock_samples * dataset.samples / 2
    size = f"{dataset.samples / 1e6:.0f}M"
    return [
        row(f"data/resume/{size}/vs-webdataset-skipping/time", middle, skipped, "s"),
        row(f"data/resume/{size}/vs-100-ms-and-the-order/time", middle, 0.1 + order, "s", 1.0),
        row(f"data/resume/{size}/vs-resume-at-the-start/time", middle, at_start, "s", 0.5),
    ]


def _ordering(config: DataBench) -> list[dict[str, Any]]:
    sizes = torch.full((-(-config.order_samples // 256),), 256, dtype=torch.int32)
    make = lambda: BlockOrder(sizes, seed=0).locate(config.order_samples // 2, config.order_samples // 2 + 1)  # noqa: E731
    seconds = min(_seconds(make) for _ in range(config.rounds))
    size = f"{config.order_samples / 1e6:.0f}M"
    found = [row(f"data/order/{size}/vs-5-s/time", seconds, 5.0, "s", 1.0)]
    memory = peak_bytes(make)
    if memory:
        found.append(row(f"data/order/{size}/vs-0.3-GB/memory", memory, 0.3e9, "bytes", 1.0))
    return found


def _flat_memory(config: DataBench, folder: Path) -> dict[str, Any]:
    loader = _loader(config, TokenDataset(folder / "tokens"))
    at: dict[int, float] = {}
    for mark in (config.memory_samples // 10, config.memory_samples):
        while loader.position < mark:
            loader.next_batch()
        gc.collect()
        at[mark] = resident_bytes()
    first, last = at.values()
    return row(f"data/memory-after/{config.memory_samples / 1e6:g}M/vs-a-tenth/memory", last, first, "bytes", 0.95)


def _seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began
