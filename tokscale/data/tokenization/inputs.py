"""From a unit's input shards to images that are ready to encode; what cannot be used comes out with its reason."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokscale.base.config import fingerprint
from tokscale.base.errors import DataError
from tokscale.base.files import read_json
from tokscale.base.log import logger
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.base.shapes import Tensor, UInt8
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.captions import CAPTIONS
from tokscale.data.raw.images import decode_image, resize, with_channels
from tokscale.data.raw.places import RawPlace
from tokscale.data.raw.shards import IMAGE_ENDINGS, SHARD_ENDINGS, RawSample, RawShard
from tokscale.data.tokenization.memory import ImageMemory
from tokscale.data.tokenization.plan import InputShard, Unit
from tokscale.data.tokenization.recipe import Recipe
from tokscale.data.tokenization.units import BadInput, Rejected
from tokscale.data.tokenization.variants import boxes, crops
from tokscale.data.tokens.manifest import CODES
from tokscale.tokenizers.text.base import AnyTextTokenizer

Shape = tuple[int, int, int]
"""Channels, rows and columns."""
CHUNK = 32
"""Samples that travel together between stages: fewer would cost more in handing over than in decoding."""

log = logger("tokenize")


@dataclass(frozen=True)
class Fetched:
    """A sample's files in memory."""

    key: str
    source: tuple[int, int]
    """Input's number in the plan, place within it."""
    input: str
    offset: int
    image: bytes
    captions: tuple[str, ...]
    scores: Mapping[str, float]
    label: int | None = None
    notes: tuple[str, ...] = ()
    """What is to be counted of it, see `notes`."""


@dataclass(frozen=True)
class InputReport:
    """What is to be known of an input shard as such."""

    bad: BadInput | None = None
    """Set when nothing of it is used."""
    noted: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedImage:
    """A sample that is ready to encode."""

    key: str
    source: tuple[int, int]
    captions: tuple[str, ...]
    size: tuple[int, int]
    """Width and height of the source image."""
    crop: NDArray[np.float32]
    """As blocks store it."""
    pixels: Mapping[Shape, UInt8[Tensor, "variants channels height width"]]
    """By shape."""
    scores: Mapping[str, float]
    label: int | None = None
    part: str = ""
    """Of the tokenization: its aspect bucket, if there are any."""
    notes: tuple[str, ...] = ()
    """What is to be counted of it, see `notes`."""
    damage: Rejected | None = None
    """What is wrong with the image's file, which was kept all the same."""


def shape_of(tokenizer: ImageTokenizer) -> Shape:
    """Of the images that a tokenizer encodes."""
    return tokenizer.channels, *tokenizer.image_hw


def list_inputs(raw: RawPlace) -> list[InputShard]:
    """The raw shards of a place that are finished, with the sizes and counts that their maker left.

    Where img2dataset wrote `NNNNN_stats.json`, its last act for a shard, a shard without one is still being written or
    torn, and is left for a later extension of the plan. What is no whole shard, or no file at all, is found out when it
    is read: one of them must not keep the others from being tokenized.

    Raises:
        DataError: When there are none.
    """
    manifest = raw.manifest()
    stated = {shard.file: shard for shard in manifest.shards} if manifest else {}
    names = raw.names()
    if hidden := raw.hidden():
        log.warning("%d hidden files are no shards: %s; rename them if they are data", len(hidden), hidden[:5])
    stats = raw.stats()
    found, unfinished = [], []
    for name in names:
        stem = next(name.removesuffix(ending) for ending in SHARD_ENDINGS if name.endswith(ending))
        if name in stated:
            made = stated[name]
            found.append(InputShard(path=name, bytes=made.bytes, samples=made.samples, tag=raw.tag(name)))
        elif not stats:
            found.append(InputShard(path=name, bytes=raw.seen(name)[0], tag=raw.tag(name)))
        elif stem in stats and (successes := _successes(stats[stem])) is not None:
            found.append(InputShard(path=name, bytes=raw.seen(name)[0], samples=successes, tag=raw.tag(name)))
        else:
            unfinished.append(name)
    if unfinished:
        log.warning(
            "%d raw shards without _stats.json are unfinished and left out: %s", len(unfinished), unfinished[:5]
        )
    return found


def _successes(path: Path) -> int | None:
    """How many samples a shard's maker counted; None when its record is torn, too."""
    try:
        counted = read_json(path)["successes"]
    except (DataError, KeyError, TypeError):
        return None
    return counted if isinstance(counted, int) and counted >= 0 else None


def inputs_now(raw: RawPlace, unit: Unit) -> str:
    """What a unit's input files are now, in a word that changes with any of them."""
    return fingerprint([[shard.path, *raw.seen(shard.path)] for shard in unit.inputs])


def read_chunks(recipe: Recipe, unit: Unit) -> Iterator[list[Fetched | Rejected | InputReport]]:
    """The samples of a unit in order, up to `CHUNK` at a time, their files in memory.

    An input that is damaged as a whole, or is not the file that was planned, costs what it holds and no more: it comes
    as a report.
    """
    chunk: list[Fetched | Rejected | InputReport] = []
    for ordinal, planned in enumerate(unit.inputs, start=unit.first_input):
        try:
            shard = _open_planned(recipe.raw, planned)
        except DataError as error:
            size, written = recipe.raw.seen(planned.path)
            why = str(error).removeprefix(f"{recipe.raw}/{planned.path}: ")
            bad = BadInput(
                input=ordinal, path=planned.path, why=why, samples=planned.samples, bytes=size, mtime_ns=written
            )
            chunk.append(InputReport(bad))
            continue
        if ordinal + 1 in unit.numbers:
            recipe.raw.expect(unit.inputs[ordinal + 1 - unit.first_input].path)
        with shard:
            if shard.hidden:
                chunk.append(InputReport(noted={"hidden_files": shard.hidden}))
            for row in range(len(shard.samples)):
                chunk.append(fetch(recipe, shard, (ordinal, row)))
                if len(chunk) >= CHUNK:
                    yield chunk
                    chunk = []
    if chunk:
        yield chunk


def _open_planned(raw: RawPlace, planned: InputShard) -> RawShard:
    shard = raw.open(planned.path)
    size, held = raw.seen(planned.path)[0], len(shard.samples)
    if size != planned.bytes:
        raise DataError(f"has {size} bytes, {planned.bytes} were planned; it was replaced or is still being written")
    if raw.tag(planned.path) != planned.tag:
        raise DataError(f"its tag is {raw.tag(planned.path)}, {planned.tag} was planned; it was replaced")
    if planned.samples is not None and held != planned.samples:
        raise DataError(f"its maker states {planned.samples} samples, but it holds {held}; fetch or prepare it again")
    return shard


def fetch(recipe: Recipe, shard: RawShard, source: tuple[int, int]) -> Fetched | Rejected:
    """Read one sample's files."""
    sample = shard.samples[source[1]]
    notes = _unread(recipe, sample)
    try:
        _check_quality(recipe, shard, sample)
        return Fetched(
            key=sample.key,
            source=source,
            input=shard.path.name,
            offset=sample.offset,
            image=shard.image(sample, recipe.transform.member),
            captions=_captions(recipe, shard, sample, notes),
            scores=_scores(recipe.scores, shard, sample, notes),
            label=shard.label(sample) if recipe.labels else None,
            notes=tuple(notes),
        )
    except BadSample as error:
        key = sample.key.encode(errors="backslashreplace").decode()
        return Rejected(key, shard.path.name, sample.offset, error.reason, error.detail)


def make_image(
    fetched: Fetched | Rejected, recipe: Recipe, memory: ImageMemory | None = None
) -> PreparedImage | Rejected:
    """Decode, filter, crop and resize one sample, into memory that is used again where there is some."""
    if isinstance(fetched, Rejected):
        return fetched
    reject = lambda reason, detail: Rejected(fetched.key, fetched.input, fetched.offset, reason, detail)  # noqa: E731
    try:
        damage: list[str] = []
        pixels = decode_image(
            fetched.image,
            orient=recipe.transform.orient,
            max_pixels=recipe.transform.max_pixels,
            on_corrupt=damage.append if recipe.transform.keep_corrupt else None,
        )
        made = _cropped(fetched, pixels, recipe, memory or ImageMemory())
        if not damage:
            return made
        return replace(made, damage=reject("corrupt", damage[0]), notes=(*made.notes, "corrupt_kept"))
    except BadSample as error:
        return reject(error.reason, error.detail)
    except Exception as error:  # one image that a decoder cannot bear must not cost the other thousands
        return reject("decode", f"{type(error).__name__}: {error}")


def _cropped(
    fetched: Fetched, pixels: UInt8[Tensor, "channels height width"], recipe: Recipe, memory: ImageMemory
) -> PreparedImage:
    height, width = pixels.shape[1:]
    limits = recipe.filters
    if min(width, height) < limits.min_side:
        raise BadSample("too_small", f"{width} x {height} pixels, filters.min_side={limits.min_side}")
    if limits.max_aspect is not None and max(width, height) > limits.max_aspect * min(width, height):
        raise BadSample("aspect", f"{width} x {height} pixels, filters.max_aspect={limits.max_aspect}")
    part = recipe.part_of(width, height)
    tokenizers = recipe.of(part).tokenizers
    chosen = crops(width, height, recipe.variants, tokenizers[CODES].image_hw)
    made: dict[Shape, Tensor] = {}
    for tokenizer in tokenizers.values():
        shape = shape_of(tokenizer)
        if shape in made:
            continue
        views = []
        for crop in chosen:
            cut = pixels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            view = with_channels(resize(cut, shape[1:]), shape[0])
            views.append(view.flip(2) if crop.mirrored else view)
        made[shape] = torch.stack(views, out=memory.take((len(views), *shape)))
    return PreparedImage(
        key=fetched.key,
        source=fetched.source,
        captions=fetched.captions,
        size=(width, height),
        crop=boxes(chosen),
        pixels=made,
        scores=fetched.scores,
        label=fetched.label,
        part=part,
        notes=fetched.notes,
    )


def _unread(recipe: Recipe, sample: RawSample) -> list[str]:
    """What of a sample's files nothing will read."""
    images = sum(ending in IMAGE_ENDINGS for ending in sample.members)
    known = {"txt", "json", CAPTIONS, recipe.text.member, recipe.transform.member, *IMAGE_ENDINGS} | (
        {"cls"} if recipe.labels else set()
    )
    notes = ["second_images"] if images > 1 else []
    return notes + ["other_files"] * len(sample.members.keys() - known)


def _captions(recipe: Recipe, shard: RawShard, sample: RawSample, notes: list[str]) -> tuple[str, ...]:
    limits = recipe.filters
    try:
        written = shard.captions(
            sample, split_lines=recipe.text.split_lines, member=recipe.text.member, field=recipe.text.field
        )
    except BadSample as error:
        if limits.min_caption == 0 and error.reason in ("caption_missing", "caption_empty"):
            return ()
        raise
    if recipe.text.split_lines:
        notes += ["captions_split"] * (len(written) > 1 and CAPTIONS not in sample.members)
    else:
        notes += ["captions_with_lines"] * sum("\n" in caption for caption in written)
    most = math.inf if limits.max_caption is None else limits.max_caption
    kept = tuple(line for line in written if limits.min_caption <= len(line) <= most)
    if not kept:
        longest = max(map(len, written))
        raise BadSample(
            "caption_length", f"{longest} characters, filters.min_caption={limits.min_caption}, max_caption={most}"
        )
    if recipe.caption_tokenizer is not None and limits.max_tokens is not None:
        kept = _short_enough(kept, recipe.caption_tokenizer, limits.max_tokens)
    notes += ["captions_left_out"] * (len(written) - len(kept))
    return kept


def _short_enough(captions: Sequence[str], tokenizer: TextTokenizer, most: int) -> tuple[str, ...]:
    if isinstance(tokenizer, AnyTextTokenizer):
        lengths = [len(tokens) for tokens in tokenizer.encode_ragged(captions)]
    else:  # of another package, which need not give more than the protocol says
        lengths = tokenizer.encode(captions, most + 1)[1].sum(1).tolist()
    if min(lengths) > most:
        raise BadSample("caption_length", f"{min(lengths)} tokens, max_tokens={most}")
    return tuple(caption for caption, length in zip(captions, lengths, strict=True) if length <= most)


def _scores(names: Sequence[str], shard: RawShard, sample: RawSample, notes: list[str]) -> dict[str, float]:
    if not names:
        return {}
    values = _metadata(shard, sample)
    scores = {name: _number(values.get(name)) for name in names}
    notes += ["scores_missing"] * sum(math.isnan(score) for score in scores.values())
    return scores


def _check_quality(recipe: Recipe, shard: RawShard, sample: RawSample) -> None:
    limits = recipe.filters
    if not limits.least and not limits.most:
        return
    values = _metadata(shard, sample)
    for name, least in limits.least.items():
        if not _number(values.get(name)) >= least:
            raise BadSample("quality", f"{name} is {values.get(name)!r}, filters.least.{name}={least:g}")
    for name, most in limits.most.items():
        if not _number(values.get(name)) <= most:
            raise BadSample("quality", f"{name} is {values.get(name)!r}, filters.most.{name}={most:g}")


def _metadata(shard: RawShard, sample: RawSample) -> dict[str, Any]:
    if "json" not in sample.members:
        return {}
    try:
        values = json.loads(shard.read(sample, "json"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
