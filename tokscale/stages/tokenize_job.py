"""What the actions of `tokscale tokenize` share: the keys, and what follows from them, loaded when first asked for."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from tokscale.base.config import Config, PathKey, PlaceKey, fingerprint
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.files import may_write
from tokscale.base.flock import EXCLUSIVE, try_lock
from tokscale.base.log import logger
from tokscale.base.protocols import TextTokenizer
from tokscale.data.raw.places import raw_place
from tokscale.data.raw.shards import RawManifest
from tokscale.data.remote.config import RemoteConfig
from tokscale.data.tokenization.config import (
    CheckConfig,
    FilterConfig,
    TextConfig,
    TransformConfig,
    VariantConfig,
    WorkConfig,
)
from tokscale.data.tokenization.finalise import Progress, outcome, progress_of
from tokscale.data.tokenization.inputs import inputs_now, list_inputs
from tokscale.data.tokenization.leases import Attempts, Leases
from tokscale.data.tokenization.pipeline import Pipeline, Recipe
from tokscale.data.tokenization.plan import Plan, forget_plan, grouped, make_plan, read_plan
from tokscale.data.tokenization.units import finished, invalidate
from tokscale.data.tokens.blocks import BLOCK_SIZE
from tokscale.data.tokens.manifest import CODES
from tokscale.data.tokens.views import ViewRule
from tokscale.dist.device import choose_device
from tokscale.dist.env import ProcessEnv
from tokscale.dist.slurm import job_name
from tokscale.runs.lock import FolderLock, RunFolderInUseError
from tokscale.runs.stage import StageConfig
from tokscale.tokenizers.codec import FrozenImageTokenizer, Precision
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer

log = logger("tokenize")
_TURN_SECONDS = 1.0


class StreamConfig(Config):
    """One further stream of codes."""

    path: PathKey
    """Folder of its image tokenizer."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the images that are encoded; the tokenizer's own when left out. Only for convolutional tokenizers."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, values: Any) -> Any:
        return {"path": values} if isinstance(values, str | Path) else values


class TokenizeConfig(StageConfig):
    """Keys of the `tokenize` stage."""

    action: Literal["all", "plan", "run", "embed", "verify", "finalise", "stats", "status"] = "all"
    """One step alone, or all that is due. Every step may be run at any time, and again. `embed` is only done when asked
    for: it stores the states of `text_encoder` beside the codes, which take far more room than these."""
    raw: PlaceKey | None = None
    """Folder of raw shards; by default `data_dir/raw`. Also an address: `s3://bucket/folder` and its like are listed,
    `https://host/{00000..00099}.tar` names each shard."""
    remote: RemoteConfig = RemoteConfig()
    """How raw shards behind an address are read."""
    tokens: PathKey | None = None
    """Folder of token shards; by default `data_dir/tokens`."""
    streams: dict[str, StreamConfig] = {}
    """Further codes of the same images, by name: `{low: PATH}` stores the stream `codes.low` of another image
    tokenizer, `{low: {path: PATH, image_size: 128}}` that of a tokenizer at another image size. A model of two
    resolutions trains with `data.streams=[codes.low]`, which gives it as `TokenBatch.extra["codes.low"]`."""
    buckets: tuple[str, ...] = ()
    """Aspect buckets, width x height in pixels: `[256x256, 320x192, 192x320]`. Each image goes to the one whose crop
    keeps most of it, and each bucket is a data set of its own in `tokens/320x192`, so that a batch has one shape. None
    takes the square of every image. Only for convolutional tokenizers, in multiples of their reduction; further
    streams keep their proportion to the main one."""
    precision: Precision = "fp32"
    """Arithmetic of the image tokenizers' networks; `tf32` is another than `fp32` on CUDA alone. Changes ids, so it is
    part of the fingerprint and of the plan, and all workers keep to it."""
    encode_batch: int = Field(default=64, ge=1)
    """Images encoded together, variants counted. Part of the fingerprint, since ids may depend on it."""
    block_size: int = Field(default=BLOCK_SIZE, ge=1)
    """Samples of a block."""
    unit_samples: int = Field(default=65_536, ge=1)
    """About how many samples one unit of work, and so one token shard, has."""
    transform: TransformConfig = TransformConfig()
    """From image files to pixels."""
    variants: VariantConfig = VariantConfig()
    """Crops and mirror images of each image."""
    filters: FilterConfig = FilterConfig()
    """Samples to leave out for good."""
    text: TextConfig = TextConfig()
    """What is stored of captions."""
    scores: tuple[str, ...] = ()
    """Numbers of the samples' JSON to store, for views, e.g. `aesthetic`."""
    labels: bool | None = None
    """Also store each sample's class: its `.cls` file, or `label` of its JSON. A sample without one is left out. By
    default as `prepare` says of the raw shards."""
    views: dict[str, ViewRule] = {}
    """Row masks to build when the data set is closed, by name."""
    work: WorkConfig = WorkConfig()
    """How the work is shared, and how it may fail."""
    check: CheckConfig = CheckConfig()
    """How closely `verify` looks."""
    repair: bool = False
    """With `action=verify`: make damaged units undone, so that the next run makes them again."""
    on_bad_shard: Literal["error", "drop"] = "error"
    """When an input shard cannot be read, torn or vanished: `error` makes all the others and then ends with 65, until
    it is mended; `drop` closes the data set without it, and lists it in `stats.json`."""
    redo_changed: bool = False
    """Make units again whose input shards were replaced after they had been read."""
    retry_failed: bool = False
    """Try units and input shards again that were given up."""
    allow_missing: bool = False
    """Close the data set without the units that are not done."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA when there is one."""

    @field_validator("buckets")
    @classmethod
    def _sizes(cls, buckets: tuple[str, ...]) -> tuple[str, ...]:
        for name, count in Counter(buckets).items():
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", name):
                raise ValueError(f"{name!r} is no bucket; give width x height in pixels, e.g. 320x192")
            if count > 1:
                raise ValueError(f"{name} is named twice; name it once")
        return buckets


class Job:
    """The configuration and what follows from it, loaded when first asked for."""

    def __init__(self, config: TokenizeConfig, env: ProcessEnv):
        self.config, self.env, self._retried = config, env, False
        self.raw = raw_place(config.raw or config.data_dir / "raw", config.remote)
        self.folder = config.tokens or config.data_dir / "tokens"
        work = config.work
        self.attempts = Attempts(self.folder, work.max_attempts, work.max_deaths, work.max_drop_fraction)

    @cached_property
    def device(self) -> torch.device:
        """Where this process encodes."""
        return choose_device(self.config.device, self.env.local_rank)

    @cached_property
    def tokenizers(self) -> dict[str, FrozenImageTokenizer]:
        """By stream, the main one first."""
        streams = {CODES: StreamConfig(path=self.config.image_tokenizer_folder)}
        streams |= {f"{CODES}.{name}": stream for name, stream in self.config.streams.items()}
        return {
            name: load_image_tokenizer(
                stream.path, device=self.device, precision=self.config.precision, image_size=stream.image_size
            )
            for name, stream in streams.items()
        }

    @cached_property
    def buckets(self) -> dict[str, dict[str, FrozenImageTokenizer]]:
        """By aspect bucket, and then by stream.

        Raises:
            ConfigError: When a tokenizer cannot encode images of that size.
        """
        side = self.tokenizers[CODES].image_size
        found = {}
        for name in self.config.buckets:
            width, height = map(int, name.split("x"))
            for stream, tokenizer in self.tokenizers.items():
                if height * tokenizer.image_size % side or width * tokenizer.image_size % side:
                    raise ConfigError(
                        f"buckets: {name} is no whole number of pixels for the stream {stream}, whose images have "
                        f"{tokenizer.image_size} pixels where {CODES} has {side}; choose another size"
                    )
                size = height * tokenizer.image_size // side, width * tokenizer.image_size // side
                try:
                    found.setdefault(name, {})[stream] = tokenizer.resized(size)
                except ConfigError as error:
                    raise ConfigError(f"buckets: {name}, stream {stream}: {error}") from None
        return found

    @cached_property
    def caption_tokenizer(self) -> TextTokenizer | None:
        """Who counts the tokens of captions, where they decide."""
        if self.config.filters.max_tokens is None:
            return None
        return load_text_tokenizer(self.config.text_tokenizer_folder)

    @cached_property
    def text_tokenizer(self) -> TextTokenizer | None:
        """Whose ids are stored, if any."""
        if not self.config.text.ids:
            return None
        return load_text_tokenizer(self.config.text_tokenizer_folder)

    @cached_property
    def recipe(self) -> Recipe:
        """What makes token shards of raw ones."""
        config = self.config
        return Recipe(
            raw=self.raw,
            tokenizers=self.tokenizers,
            buckets=self.buckets,
            text_tokenizer=self.text_tokenizer,
            caption_tokenizer=self.caption_tokenizer,
            transform=config.transform,
            variants=config.variants,
            filters=self._filters,
            text=config.text,
            scores=tuple(sorted(config.scores)),
            labels=self.classes is not None if config.labels is None else config.labels,
            encode_batch=config.encode_batch,
            block_size=config.block_size,
        )

    @cached_property
    def _manifest(self) -> RawManifest | None:
        return self.raw.manifest()

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the raw shards' labels, where `prepare` wrote any."""
        return self._manifest.classes if self._manifest else None

    @property
    def _filters(self) -> FilterConfig:
        # Images that were prepared without captions are meant to have none.
        if self._manifest and not self._manifest.captions and "min_caption" not in self.config.filters.model_fields_set:
            return self.config.filters.model_copy(update={"min_caption": 0})
        return self.config.filters

    def planned(self) -> Plan:
        """The plan, made or extended when that is due: by new input shards, and by those that were mended."""
        self._forget_failed_plan()
        retry, self._retried = self.config.retry_failed and not self._retried, True  # once a command
        if self.config.redo_changed:
            self._invalidate_changed()
        return make_plan(
            self.folder,
            self.recipe.identity,
            lambda: list_inputs(self.raw),
            self.config.unit_samples,
            lambda plan: outcome(self.folder, self.raw, plan, retry=retry),
        )

    def _forget_failed_plan(self) -> None:
        # A first attempt that made nothing must not keep the corrected command from the folder.
        plan = read_plan(self.folder)
        if plan is None or not self._differs(plan):
            return
        with alone(self):
            plan = read_plan(self.folder)
            if plan is None or self.leases().active():
                return
            if not any(record.shard.samples for record in finished(self.folder, plan)):
                log.info("%s: forgets the plan of an earlier tokenization that made nothing", self.folder)
                for unit, bucket in product(plan.units, plan.buckets):
                    invalidate(self.folder / bucket, unit.number)
                forget_plan(self.folder)

    def _differs(self, plan: Plan) -> bool:
        """Whether this job would have planned the same inputs otherwise."""
        sizes = tuple(part.units for part in plan.parts)
        wanted = tuple(grouped(part.inputs, self.config.unit_samples) for part in plan.parts)
        return plan.run != fingerprint(self.recipe.identity) or sizes != wanted

    def _invalidate_changed(self) -> None:
        plan = read_plan(self.folder)
        if plan is None:
            return
        found = {shard.path: shard.content for shard in list_inputs(self.raw)}
        read = outcome(self.folder, self.raw, plan).read
        for unit in plan.units:
            changed = [plan.inputs[n].path for n in unit.numbers if n in read]
            changed = [
                path for path in changed if found.get(path) not in (None, plan.inputs[plan.latest[path]].content)
            ]
            if changed:
                log.warning("unit %d: made again, since %s was replaced", unit.number, ", ".join(changed))
                for bucket in plan.buckets:
                    invalidate(self.folder / bucket, unit.number)

    def existing_plan(self) -> Plan:
        """The plan as it stands, for steps that need no tokenizer."""
        plan = read_plan(self.folder)
        if plan is None:
            raise DataError(f"{self.folder}: no tokenization was planned here; run `tokscale tokenize`")
        return plan

    def leases(self) -> Leases:
        """This worker's view of who works on what; enter it to take part."""
        return Leases(self.folder, self.config.work.lease_seconds)

    def progress_of(self, plan: Plan) -> Progress:
        """How far the tokenization is."""
        return progress_of(self.folder, plan, self.leases(), self.attempts, lambda unit: inputs_now(self.raw, unit))

    @contextmanager
    def pipeline(self, stop: Callable[[], bool]) -> Iterator[Pipeline]:
        """The stages of this process, inside the context; `stop` is asked between chunks."""
        work = self.config.work
        threads = work.decode_threads or len(os.sched_getaffinity(0))
        pipeline = Pipeline(self.recipe, threads=threads, queue=work.queue, device=self.device, stop=stop)
        try:
            yield pipeline
        finally:
            pipeline.close()


def leave(job: Job, leases: Leases, sweep: Callable[[], None]) -> None:
    """End a worker's turn. The last of them clears up, and all others just go.

    A worker takes its own heartbeat down before it looks for others', so of several that leave at once at least one
    sees nobody.

    Args:
        job: Whose worker.
        leases: Its own.
        sweep: Removes what killed workers left.
    """
    leases.leave()
    if leases.others():
        return
    with alone(job, wait=False) as ours:
        if ours and not leases.others():  # asked inside, too: others may begin to work meanwhile
            leases.forget_dead()
            leases.clear()
            sweep()


@contextmanager
def alone(job: Job, *, wait: bool = True) -> Iterator[bool]:
    """One process at a time closes a data set or sweeps its folder; those that come together take turns.

    The kernel frees the lock with its process, so a kill leaves nothing to clean up. Where the file system has no such
    locks, a record and its heartbeat do it. A folder that may only be read needs no lock.

    Args:
        job: Of the folder.
        wait: For a turn; otherwise the context is told whether it is alone.
    """
    if not may_write(job.folder):
        yield True
        return
    with open(job.folder / ".closing", "a") as file:
        locked = try_lock(file, EXCLUSIVE, wait=wait)
        if locked is not None:
            yield locked
            return
    lock = _recorded_lock(job.folder, wait)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _recorded_lock(folder: Path, wait: bool) -> FolderLock | None:
    while True:
        try:
            return FolderLock(folder, job_name(), ".closing.lock")
        except RunFolderInUseError:
            if not wait:
                return None
            time.sleep(_TURN_SECONDS)


def sources_of(config: TokenizeConfig, folder: Path) -> str | None:
    """The key that has training read this folder of token shards; None where it does so by itself."""
    return (
        None if folder == config.data_dir / "tokens" else f"[{{path: {json.dumps(str(folder), ensure_ascii=False)}}}]"
    )
