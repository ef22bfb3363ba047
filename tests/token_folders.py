"""Small sets of token shards whose every sample knows its own number."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokscale.data.tokens.blocks import ShardWriter, TokenSample, code_dtype, pack
from tokscale.data.tokens.manifest import StreamRecord, TokenDataset, write_manifest

SHAPE = (2, 2)


def record(fingerprint: str = "f" * 64, num_tokens: int = 60_000) -> StreamRecord:
    return StreamRecord(tokenizer=fingerprint, num_tokens=num_tokens, code_shape=SHAPE, image_size=16)


def make_tokens(
    folder: Path,
    blocks: Sequence[int] = (4, 4, 3, 4, 1),
    *,
    shards: int = 2,
    captions: int = 2,
    variants: int = 1,
    first: int = 0,
    streams: dict[str, StreamRecord] | None = None,
    **manifest: Any,
) -> TokenDataset:
    """Sample n has codes n, key `n`, captions `n/0`, `n/1`, ...; `blocks` are the sizes, dealt over the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    streams = streams or {"codes": record()}
    shapes = {name: stream.code_shape for name, stream in streams.items()}
    dtypes = {name: code_dtype(stream.num_tokens) for name, stream in streams.items()}
    records, number = [], first
    for shard, sizes in enumerate(np.array_split(np.array(blocks), shards)):
        name = f"tokens-{shard:06d}.tar"
        with open(folder / name, "wb") as file:
            writer = ShardWriter(file, {"version": 1})
            for size in sizes.tolist():
                rows = [
                    _sample(number + at, captions, variants, shapes, "text" in manifest, "labels" in manifest)
                    for at in range(size)
                ]
                writer.add(pack(rows, dtypes), size)
                number += size
            records.append(writer.finish(name))
    write_manifest(folder, records, run="r" * 64, streams=streams, variants=variants, **manifest)
    return TokenDataset(folder)


def _sample(
    number: int, captions: int, variants: int, shapes: Mapping[str, tuple[int, ...]], ids: bool, label: bool
) -> TokenSample:
    lead = (variants,) if variants > 1 else ()
    codes = {name: np.full((*lead, *shape), number) for name, shape in shapes.items()}
    if variants > 1:
        codes = {name: value + 1000 * np.arange(variants).reshape(-1, 1, 1) for name, value in codes.items()}
    return TokenSample(
        key=str(number),
        captions=[f"{number}/{i}" for i in range(captions)],
        codes=codes,
        source=(0, number),
        size=(64 + number, 64),
        crop=np.zeros((*lead, 4), np.float32),
        text=[np.array([ord(letter) for letter in f"{number}/{i}"]) for i in range(captions)] if ids else None,
        label=number if label else None,
        scores={"aesthetic": float(number)},
    )


class LetterTokenizer:
    """Ids of a caption are its characters' codes: reversible by eye."""

    num_tokens = 256
    fingerprint = "letters"

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, captions: Sequence[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        ids = torch.zeros(len(captions), length, dtype=torch.int64)
        for row, caption in enumerate(captions):
            for place, letter in enumerate(caption[:length]):
                ids[row, place] = ord(letter)
        return ids, ids > 0

    def decode(self, ids: torch.Tensor) -> list[str]:
        return ["".join(chr(i) for i in row if i) for row in ids.tolist()]
