"""Captions of token shards to shards of a text encoder's states, by any number of workers, resumable shard by shard."""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from tokscale.base.errors import DataError, StopRequested
from tokscale.base.files import atomic_write, fsync_folder, sha256_file, storage_errors, write_json
from tokscale.base.protocols import TextEncoder
from tokscale.base.shapes import Tensor
from tokscale.data.tokenization.leases import Leases
from tokscale.data.tokens.blocks import Block, ShardRecord, ShardWriter
from tokscale.data.tokens.embeds import (
    ABOUT,
    BLOCK_SUFFIX,
    FOLDER,
    EmbedsAbout,
    EmbedsRecord,
    is_embedded,
    read_about,
    shard_names,
)
from tokscale.data.tokens.manifest import ShardEntry, TokenDataset
from tokscale.dist.slurm import note_kept


@dataclass(frozen=True)
class Bill:
    """What the states of a data set take, from a look at some of its blocks."""

    captions: int
    """Captions of all samples, each of which is embedded."""
    words: float
    """Mean tokens of a caption."""
    bytes: int
    """Captions x tokens x width x bytes of a number."""
    codes: int
    """Bytes of the token shards, to compare."""

    def __str__(self) -> str:
        return (
            f"the states take about {self.bytes / 1e9:.3g} GB ({self.captions} captions of {self.words:.1f} tokens on "
            f"average), {self.bytes / self.codes:.0f} times the {self.codes / 1e9:.3g} GB of the token shards"
        )


def bill(dataset: TokenDataset, encoder: TextEncoder, bytes_each: int, looks: int = 8) -> Bill:
    """Estimate the room that states need; reads at most `looks` blocks, evenly spread."""
    count = len(dataset.sizes)
    captions = words = samples = 0
    for number in np.unique(np.linspace(0, count - 1, min(looks, count)).astype(int)).tolist():
        block = dataset.read(number)
        texts = block.caption_texts(_numbers(block))
        samples += len(block)
        captions += len(texts)
        words += int(encoder.tokenize(texts)[1].sum()) if texts else 0
    total = round(captions / samples * dataset.samples)
    mean = words / max(captions, 1)
    size = round(total * mean * encoder.width * bytes_each)
    return Bill(total, mean, size, sum(shard.bytes for shard in dataset.manifest.shards))


def claim_folder(folder: Path, about: EmbedsAbout, *, in_work: bool = False) -> None:
    """Make `embeds/` this encoder's, or see that it is. Another's that made nothing does not keep the folder.

    Args:
        folder: Of token shards.
        about: Whose states are to come.
        in_work: Whether somebody is making states there now.

    Raises:
        DataError: When it holds the states of another encoder; names both.
    """
    there = read_about(folder)
    made = in_work or any((folder / FOLDER).glob(f"{FOLDER}-*.json"))
    if there is None or (there.encoder != about.encoder and not made):
        write_json(folder / FOLDER / ABOUT, about.model_dump(mode="json"))
    elif there.encoder != about.encoder:
        raise DataError(
            f"{folder / FOLDER}: holds the states of the text encoder {there.encoder[:12]} ({there.path}, "
            f"{there.precision}, {there.length} tokens), this one is {about.encoder[:12]} ({about.path}, "
            f"{about.precision}, {about.length} tokens); set it as it was, or remove the folder"
        )


def embed_shards(
    dataset: TokenDataset,
    encoder: TextEncoder,
    leases: Leases,
    *,
    stop: Callable[[], bool],
    progress: Callable[[int], None],
) -> tuple[int, dict[str, str]]:
    """Embed the captions of every shard that is not done and that nobody else has.

    Args:
        dataset: The token shards.
        encoder: Makes the states.
        leases: Entered, of the folder `embeds/`.
        stop: True ends the turn at the next block.
        progress: Told how many samples are through.

    Returns:
        How many shards were made, and who has those that are left.

    Raises:
        StopRequested: When asked to stop; the shard in work is abandoned.
        StorageError: When the file system refuses.
    """
    made, elsewhere, first = 0, {}, 0
    for number, entry in enumerate(dataset.manifest.shards):
        blocks = range(first, first + entry.blocks)
        first += entry.blocks
        if is_embedded(dataset, encoder.fingerprint, entry.file, entry.sha256):
            continue
        if leases.claim(number) is None:
            elsewhere[entry.file] = leases.owner(number) or "another worker"
            continue
        with leases.held(number):
            if not is_embedded(dataset, encoder.fingerprint, entry.file, entry.sha256):
                _embed_shard(dataset, entry, blocks, encoder, stop, progress)
                made += 1
                note_kept()
    return made, elsewhere


def embed_problems(folder: Path) -> Iterator[tuple[str, str]]:
    """Everything wrong with finished shards of states: where, and what."""
    for path in sorted((folder / FOLDER).glob("*.tar")):
        try:
            record = json.loads(path.with_suffix(".json").read_text())["shard"]
        except (OSError, ValueError, KeyError, TypeError):
            yield str(path), "has no readable record; run `tokscale tokenize action=embed`"
            continue
        if path.stat().st_size != record["bytes"]:
            yield str(path), f"has {path.stat().st_size} bytes, its record says {record['bytes']}"
        elif sha256_file(path) != record["sha256"]:
            yield str(path), "is not the file that was written: its sha256 differs"


def _embed_shard(
    dataset: TokenDataset,
    entry: ShardEntry,
    blocks: range,
    encoder: TextEncoder,
    stop: Callable[[], bool],
    progress: Callable[[int], None],
) -> None:
    name, record_name = shard_names(entry.file)
    folder, words = dataset.files.beside(FOLDER), 0
    header = {"format": "tokscale-embeds", "version": 1, "encoder": encoder.fingerprint, "tokens": entry.sha256}
    with atomic_write(folder / name) as file:
        writer = ShardWriter(file, header, suffix=BLOCK_SUFFIX)
        for number in blocks:
            if stop():
                raise StopRequested("asked to stop; finished shards are kept, run the same command to go on")
            block = dataset.read(number)
            packed, states = _packed(block, encoder)
            words += states
            with storage_errors(folder / name):
                writer.add(packed, len(block))
            progress(len(block))
        shard: ShardRecord = writer.finish(name)
    record = EmbedsRecord(encoder=encoder.fingerprint, tokens=entry.sha256, words=words, shard=shard)
    fsync_folder(folder)
    write_json(folder / record_name, record.model_dump(mode="json"))


def _packed(block: Block, encoder: TextEncoder) -> tuple[bytes, int]:
    """The bytes of a block of states, and how many there are."""
    captions = [*block.caption_texts(_numbers(block)), ""]
    states, mask = encoder.encode(captions)
    kept: Tensor = states[mask].cpu().contiguous()
    lengths = mask.sum(1).cpu()
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = kept.view(torch.uint8).flatten().numpy().tobytes() if kept.numel() else b""
    each = encoder.width * kept.element_size()
    bounds = (ends * each).tolist()
    crc = [zlib.crc32(rows[at:stop]) for at, stop in pairwise(bounds)]
    tensors = {"states": kept, "ends": ends, "crc32": torch.tensor(crc, dtype=torch.int64)}
    return safetensors.torch.save(tensors), int(ends[-1])


def _numbers(block: Block) -> NDArray[np.int64]:
    return np.arange(int(block.tensors["cap_row"][-1]))
