"""Is what was made still what was made: bytes, counts, ranges, texts, and the manifest over them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokscale.base.errors import DataError
from tokscale.base.files import sha256_file
from tokscale.data.tokenization.plan import Plan, Unit
from tokscale.data.tokenization.units import NAME, finished, read_unit, record_path, total_drops
from tokscale.data.tokens.blocks import Block, read_block
from tokscale.data.tokens.manifest import CODES, MANIFEST, TokenDataset, read_token_manifest


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    path: str
    what: str
    unit: int | None = None
    """Which unit to do again; None when only the manifest is wrong."""

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def verify_unit(folder: Path, plan: Plan, unit: Unit) -> list[Problem]:
    """Everything that is wrong with a finished unit, in all its buckets."""
    found = [
        problem for bucket in plan.buckets for problem in _verify_part(folder / bucket, plan.of(bucket), unit.number)
    ]
    try:
        records = [read_unit(folder / bucket, unit.number) for bucket in plan.buckets]
    except DataError:  # said above
        return found
    entered = sum(record.samples_in for record in records)
    bad = {found.input for record in records for found in record.bad_inputs}
    counts = [shard.samples for number, shard in zip(unit.numbers, unit.inputs, strict=True) if number not in bad]
    if None not in counts and entered != sum(filter(None, counts)):
        sidecar = record_path(folder / plan.buckets[0], unit.number)
        what = f"{entered} samples went in, the inputs state {sum(filter(None, counts))}"
        found.append(Problem(str(sidecar), what, unit.number))
    return found


def _verify_part(folder: Path, plan: Plan, unit: int) -> list[Problem]:
    sidecar = record_path(folder, unit)
    say = lambda path, what: Problem(str(path), what, unit)  # noqa: E731
    try:
        record = read_unit(folder, unit)
    except DataError as error:
        return [Problem(str(sidecar), str(error).removeprefix(f"{sidecar}: "), unit)]
    found: list[Problem] = []
    if record.run != plan.run or record.unit != unit:
        found.append(say(sidecar, f"is the record of unit {record.unit} of run {record.run[:12]}, not of this one"))
    through = record.shard.samples + sum(record.drops.values())
    if record.samples_in != through:
        found.append(say(sidecar, f"{record.samples_in} samples went in and {through} came out or were left out"))
    path = folder / record.shard.file
    if not path.exists():
        return [*found, say(path, "the shard is missing")]
    size = path.stat().st_size
    if size != record.shard.bytes:
        found.append(say(path, f"has {size} of {record.shard.bytes} bytes"))
    elif sha256_file(path) != record.shard.sha256:
        found.append(say(path, "its sha256 is not the recorded one"))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        keys: set[tuple[int, str]] = set()
        for place in record.shard.blocks:
            where = f"{path}: block at byte {place.offset}"
            try:
                block = read_block(descriptor, place, str(path))
                if len(block) != place.samples:
                    found.append(say(where, f"has {len(block)} samples, its record says {place.samples}"))
                found += [say(where, what) for what in _block_problems(block, plan, keys)]
            except DataError as error:
                found.append(Problem(str(path), str(error).removeprefix(f"{path}: "), unit))
    finally:
        os.close(descriptor)
    if sum(place.samples for place in record.shard.blocks) != record.shard.samples:
        found.append(say(sidecar, f"its blocks do not add up to {record.shard.samples} samples"))
    return found


def verify_manifest(folder: Path, plan: Plan) -> list[Problem]:
    """Whether each `dataset.json` is the sum of the units' records; nothing where it is not written yet."""
    return [problem for bucket in plan.buckets for problem in _manifest_problems(folder / bucket, plan.of(bucket))]


def _manifest_problems(folder: Path, plan: Plan) -> list[Problem]:
    if not (folder / MANIFEST).exists():
        return []
    try:
        manifest = read_token_manifest(folder)
        TokenDataset(folder)
    except DataError as error:
        return [Problem(str(folder), str(error).removeprefix(f"{folder}/"))]
    records = finished(folder, plan)
    wanted = {record.shard.file: record.shard for record in records}
    stated = {shard.file: shard for shard in manifest.shards}
    path = str(folder / MANIFEST)
    found = [Problem(path, f"names {file}, which no unit made") for file in stated.keys() - wanted.keys()]
    found += [Problem(path, f"leaves out {file}") for file in wanted.keys() - stated.keys()]
    for file in stated.keys() & wanted.keys():
        ours, theirs = wanted[file], stated[file]
        if (ours.sha256, ours.bytes, ours.samples, len(ours.blocks)) != (
            theirs.sha256,
            theirs.bytes,
            theirs.samples,
            theirs.blocks,
        ):
            found.append(Problem(path, f"does not say of {file} what its unit's record says"))
    if manifest.run != plan.run or manifest.samples != sum(shard.samples for shard in wanted.values()):
        found.append(Problem(path, f"its run or its {manifest.samples} samples are not those of the units"))
    if manifest.drops != total_drops(records):
        found.append(Problem(path, "its drops are not those of the units"))
    return found


def strays(folder: Path, plan: Plan) -> list[Path]:
    """Shards that belong to no unit."""
    wanted = {f"{NAME}-{unit.number:06d}.tar" for unit in plan.units}
    found = [path for bucket in plan.buckets for path in (folder / bucket).glob(f"{NAME}-*.tar")]
    return sorted(path for path in found if path.name not in wanted)


def _block_problems(block: Block, plan: Plan, keys: set[tuple[int, str]]) -> Iterator[str]:
    tensors = block.tensors
    for name, stream in plan.streams.items():
        if name not in tensors:
            yield f"has no stream {name}"
            continue
        codes = tensors[name]
        if codes.size and int(codes.max()) >= stream.num_tokens:
            yield f"{name} has the id {codes.max()}, the tokenizer only {stream.num_tokens}"
        variants = plan.identity["variants"]["count"]
        if codes.shape[1:] != (*((variants,) if variants > 1 else ()), *stream.code_shape):
            yield f"{name} has the shape {codes.shape[1:]}, the tokenizer {stream.code_shape}"
    for name, of in (("cap_off", "cap"), ("key_off", "key"), ("cap_row", "cap_off"), ("text_off", "text")):
        if name not in tensors:
            continue
        ends = tensors[name].astype(np.int64)
        last = len(tensors[of]) - (1 if of == "cap_off" else 0)
        if ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] != last:
            yield f"{name} does not ascend from 0 to {last}"
            return
    try:
        for row in range(len(block)):
            block.captions(row)
        names = block.keys(np.arange(len(block)))
    except UnicodeDecodeError as error:
        yield f"a caption or a key is not UTF-8 ({error})"
        return
    for source, name in zip(tensors["src"][:, 0].tolist(), names, strict=True):
        if (source, name) in keys:
            yield f"the key {name!r} comes twice from one input"
        keys.add((source, name))
    if len(tensors[CODES]) != len(names):
        yield f"has {len(tensors[CODES])} codes and {len(names)} keys"
