"""One unit from raw shards to a token shard, its stages overlapped: read -> decode -> batch -> encode -> pack.

A thread reads and hands chunks to a pool that decodes; this thread takes the chunks back in input order, encodes full
batches and packs their codes. On an accelerator the codes of a batch are fetched when the next one is under way.
Everything that waits is in one bounded queue. Batches never cross a unit and the last is padded, so that a unit's bytes
depend on its inputs and settings alone. Images of different aspect buckets have batches and shards of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokscale.base.errors import ConfigError, DataError, StopRequested
from tokscale.base.shapes import Int, Tensor
from tokscale.data.loading.prefetch import Prefetcher
from tokscale.data.tokenization.inputs import (
    CHUNK,
    Fetched,
    InputReport,
    PreparedImage,
    inputs_now,
    make_image,
    read_chunks,
    shape_of,
)
from tokscale.data.tokenization.memory import ImageMemory, Stacker
from tokscale.data.tokenization.meters import Meters
from tokscale.data.tokenization.plan import Unit
from tokscale.data.tokenization.recipe import Recipe
from tokscale.data.tokenization.units import Rejected, UnitWriter
from tokscale.data.tokens.blocks import TokenSample, code_dtype, pack


@dataclass(frozen=True)
class _Batch:
    part: str
    images: Sequence[PreparedImage]
    codes: Mapping[str, Tensor]


class Pipeline:
    """The stages of one process, used for one unit after the other. Close it to end its threads."""

    def __init__(self, recipe: Recipe, *, threads: int, queue: int, device: torch.device, stop: Callable[[], bool]):
        """Start the decoding threads.

        Args:
            recipe: What to make.
            threads: Decoding threads.
            queue: Chunks that may wait; 0 chooses.
            device: Of the tokenizers.
            stop: Asked between chunks; True abandons the unit.
        """
        self.recipe, self.meters = recipe, Meters(threads)
        self._recipes = {part: recipe.of(part) for part in recipe.parts}
        self._memory, self._stacker, self._stop = ImageMemory(), Stacker(recipe.encode_batch, device), stop
        self._per_batch = recipe.encode_batch // recipe.variants.count
        if self._per_batch < 1:
            raise ConfigError(
                f"encode_batch={recipe.encode_batch}: an image has {recipe.variants.count} variants; raise it"
            )
        torch.get_num_threads()  # this thread's own number is settled before the pool sets its own
        self._queue = queue or 2 * threads + 2 * -(-self._per_batch // CHUNK)
        self._pool = ThreadPoolExecutor(threads, "decode", initializer=_one_torch_thread)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def inputs_of(self, unit: Unit) -> str:
        """What a unit's input files are now, in a word that changes with any of them."""
        return inputs_now(self.recipe.raw, unit)

    def run(self, unit: Unit, writers: Mapping[str, UnitWriter], progress: Callable[[int], None]) -> None:
        """Make a unit's blocks; the caller commits.

        Args:
            unit: What to read.
            writers: Take the blocks, by part of the recipe. The first takes the rejected samples of all.
            progress: Told how many samples are through.

        Raises:
            StopRequested: When asked to stop.
            DataError: When an input is damaged as a whole, or a tokenizer gives ids out of its range.
        """
        packers = {part: _Packer(self._recipes[part], writer) for part, writer in writers.items()}
        pending: _Batch | None = None
        for images in self._batches(unit, writers):
            launched = self._encode(images)
            if pending is not None:
                self._pack(packers[pending.part], pending, progress)
            pending = launched
        if pending is not None:
            self._pack(packers[pending.part], pending, progress)
        with self.meters["pack"].busy():
            for packer in packers.values():
                packer.flush()

    def _chunks(self, unit: Unit) -> Iterator[Future[list[PreparedImage | Rejected | InputReport]]]:
        # Runs in the reading thread.
        chunks = read_chunks(self.recipe, unit)
        while True:
            with self.meters["read"].busy():
                chunk = next(chunks, None)
            if chunk is None:
                return
            self.meters["read"].add(0, len(chunk))
            yield self._pool.submit(self._decode, chunk)

    def _decode(
        self, chunk: Sequence[Fetched | Rejected | InputReport]
    ) -> list[PreparedImage | Rejected | InputReport]:
        with self.meters["decode"].busy(len(chunk)):
            return [
                item if isinstance(item, InputReport) else make_image(item, self.recipe, self._memory) for item in chunk
            ]

    def _batches(self, unit: Unit, writers: Mapping[str, UnitWriter]) -> Iterator[list[PreparedImage]]:
        """Images of one part each, in input order."""
        waiting: dict[str, list[PreparedImage]] = {part: [] for part in writers}
        first = next(iter(writers.values()))
        ahead = Prefetcher(self._chunks(unit), self._queue, "read")
        try:
            for future in ahead:
                if self._stop():
                    raise StopRequested("asked to stop; the unit is abandoned and will be done again")
                decoded = future.result()
                self.meters.waiting = ahead.ready
                for item in decoded:
                    if not isinstance(item, PreparedImage):
                        _leave_out(item, first)
                        continue
                    writers[item.part].samples_in += 1
                    first.noted.update(item.notes)
                    first.kept += [item.damage] if item.damage else []
                    ready = waiting[item.part]
                    ready.append(item)
                    if len(ready) == self._per_batch:
                        yield ready
                        waiting[item.part] = []
            yield from filter(None, waiting.values())
        finally:
            ahead.close()

    def _encode(self, images: list[PreparedImage]) -> _Batch:
        part = images[0].part
        with self.meters["encode"].busy(len(images)):
            codes, sizes = {}, {}
            for name, tokenizer in self._recipes[part].tokenizers.items():
                shape = shape_of(tokenizer)
                if shape not in sizes:
                    pixels = [image.pixels[shape] for image in images]
                    sizes[shape] = self._stacker.stack(pixels)
                    for room in pixels:
                        self._memory.give(room)
                codes[name] = tokenizer.encode(sizes[shape])
            return _Batch(part, images, codes)

    def _pack(self, packer: "_Packer", batch: _Batch, progress: Callable[[int], None]) -> None:
        variants = self.recipe.variants.count
        with self.meters["encode"].busy():  # waits for the accelerator
            fetched = {name: codes[: len(batch.images) * variants].cpu().numpy() for name, codes in batch.codes.items()}
        with self.meters["pack"].busy(len(batch.images)):
            packer.add(batch.images, fetched)
        progress(len(batch.images))


class _Packer:
    """Codes and captions into blocks, in input order."""

    def __init__(self, recipe: Recipe, writer: UnitWriter):
        self._recipe, self._writer = recipe, writer
        self._dtypes = {name: code_dtype(tokenizer.num_tokens) for name, tokenizer in recipe.tokenizers.items()}
        text = recipe.text_tokenizer
        self._text_dtype = code_dtype(text.num_tokens) if text else np.dtype("<u2")
        self._samples: list[TokenSample] = []
        counted = getattr(text, "cut", None)
        self._cut = counted.cut if counted is not None else 0

    def add(self, images: Sequence[PreparedImage], codes: Mapping[str, NDArray[Any]]) -> None:
        variants = self._recipe.variants.count
        shaped = {}
        for name, array in codes.items():
            tokenizer = self._recipe.tokenizers[name]
            if array.size and not 0 <= int(array.min()) <= int(array.max()) < tokenizer.num_tokens:
                raise DataError(
                    f"the tokenizer of {name} gave ids from {array.min()} to {array.max()}, outside its own range of "
                    f"{tokenizer.num_tokens}; its export is damaged or its adapter is wrong"
                )
            lead = (len(images), variants) if variants > 1 else (len(images),)
            shaped[name] = array.reshape(*lead, *tokenizer.code_shape)
        text = self._ids(images)
        for row, image in enumerate(images):
            if image.label is not None:
                self._writer.labels = max(self._writer.labels or 0, image.label + 1)
            self._samples.append(
                TokenSample(
                    key=image.key,
                    captions=image.captions,
                    codes={name: array[row] for name, array in shaped.items()},
                    source=image.source,
                    size=image.size,
                    crop=image.crop,
                    text=text[row] if text is not None else None,
                    scores=image.scores,
                    label=image.label,
                )
            )
        while len(self._samples) >= self._recipe.block_size:
            self._write(self._recipe.block_size)

    def flush(self) -> None:
        if self._samples:
            self._write(len(self._samples))

    def _write(self, count: int) -> None:
        self._writer.add(pack(self._samples[:count], self._dtypes, self._text_dtype), count)
        del self._samples[:count]

    def _ids(self, images: Sequence[PreparedImage]) -> list[list[NDArray[Any]]] | None:
        tokenizer = self._recipe.text_tokenizer
        if tokenizer is None:
            return None
        captions = [caption for image in images for caption in image.captions]
        if not captions:
            return [[] for _ in images]
        ids, mask = tokenizer.encode(captions, self._recipe.text.length)
        cut = getattr(tokenizer, "cut", None)  # a tokenizer of others' may not count
        if cut is not None and cut.cut > self._cut:
            self._writer.noted["captions_cut"] += cut.cut - self._cut
            self._cut = cut.cut
        ragged = iter(_ragged(ids, mask))
        return [[next(ragged) for _ in image.captions] for image in images]


def _leave_out(item: Rejected | InputReport, writer: UnitWriter) -> None:
    if isinstance(item, Rejected):
        writer.samples_in += 1
        writer.rejected.append(item)
        return
    writer.noted.update(item.noted)
    writer.bad_inputs += [item.bad] if item.bad else []


def _ragged(ids: Int[Tensor, "batch text"], mask: Tensor) -> list[NDArray[Any]]:
    rows = ids.numpy()
    return [row[:length] for row, length in zip(rows, mask.sum(1).tolist(), strict=True)]


def _one_torch_thread() -> None:
    # The pool already fills the cores. The setting holds for this thread, and for threads that start later.
    torch.set_num_threads(1)
