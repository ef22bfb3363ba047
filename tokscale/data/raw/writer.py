"""A source becomes a folder of raw shards, which a kill at any moment leaves resumable.

`source.json` comes first and says whose folder it is, so that no two data sets ever share one. A shard is complete when
its `NNNNN_stats.json` is there, the mark that img2dataset leaves; the data set when its `manifest.json` is.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from tokscale.base.config import Config, decode, fingerprint
from tokscale.base.errors import DataError
from tokscale.base.files import atomic_write, read_json, sha256_file, write_json
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.shards import MANIFEST, RawManifest, RawRecord, ShardRecord, read_raw_manifest, write_shard
from tokscale.data.raw.sources import Source
from tokscale.dist.slurm import note_kept

OWNER = "source.json"
_GAVE_UP = "gave_up"
"""In it: whether so many samples were unusable that the work ended; then it is gone on with, or begun anew."""
REJECTED = "rejected.jsonl"
_CHUNK = 64


class Rejection(Config):
    """A source sample that was left out."""

    index: int
    """Its number in the source."""
    name: str = ""
    """Where it comes from: a path, the number of a row, a key."""
    shard: str = ""
    """Which shard lacks it."""
    reason: str
    detail: str


class ShardStats(Config):
    """`NNNNN_stats.json`: what went into a shard, and what did not. Renamed into place after its shard."""

    count: int
    """Source samples that were looked at."""
    successes: int
    """Samples in the shard."""
    bytes: int
    sha256: str
    status_dict: dict[str, int]
    """Samples by outcome, `success` or the reason, as img2dataset counts them."""
    rejected: tuple[Rejection, ...]


class RawWriter:
    """Writes one source into one folder."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        described: dict[str, Any],
        *,
        shard_samples: int,
        max_drop_fraction: float,
        threads: int,
        classes: Sequence[str] | None = None,
        captions: bool = True,
    ):
        """Prepare to write; nothing is touched yet.

        Args:
            folder: Of the shards.
            source: What is written.
            described: The source's configuration.
            shard_samples: Source samples in a shard.
            max_drop_fraction: More unusable samples than this end the work.
            threads: That read and check samples.
            classes: Names of the labels, where there are any.
            captions: Whether every sample has one.
        """
        self.classes, self.captions = tuple(classes) if classes is not None else None, captions
        self.folder, self.source, self.described = folder, source, described
        self.shard_samples, self.max_drop_fraction, self.threads = shard_samples, max_drop_fraction, threads
        self.fingerprint = fingerprint(
            {"source": described, "identity": source.identity(), "shard_samples": shard_samples, "count": len(source)}
        )

    @property
    def shards(self) -> int:
        """How many shards the source fills."""
        return -(-len(self.source) // self.shard_samples)

    def finished(self) -> RawManifest | None:
        """The manifest, when all is there already.

        Raises:
            DataError: When the folder holds something else.
        """
        self._require_ours()
        manifest = read_raw_manifest(self.folder)
        if manifest is None or manifest.fingerprint != self.fingerprint:
            return None
        sizes = {shard.file: shard.bytes for shard in manifest.shards}
        return manifest if all(_size(self.folder / name) == size for name, size in sizes.items()) else None

    def write(self, progress: Callable[[int], None]) -> RawManifest:
        """Write what is missing; whole shards of an earlier run are kept.

        Args:
            progress: Told how many source samples are through.

        Raises:
            DataError: When the folder holds something else, or too many samples are unusable.
            StorageError: When the file system refuses.
        """
        self._require_ours()
        self._forget_failed()
        (self.folder / MANIFEST).unlink(missing_ok=True)
        write_json(self.folder / OWNER, self._owner())
        stats: list[ShardStats] = []
        drops: Counter[str] = Counter()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="prepare") as pool:
            for number in range(self.shards):
                kept = self._kept(number)
                stats.append(kept or self._write_shard(number, pool, progress))
                if kept:
                    progress(kept.count)
                drops.update(entry.reason for entry in stats[-1].rejected)
                if drops.total() > self.max_drop_fraction * len(self.source):
                    self._give_up(stats, drops)
        return self._close(stats, drops)

    def _owner(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "source": self.described}

    def _write_shard(self, number: int, pool: ThreadPoolExecutor, progress: Callable[[int], None]) -> ShardStats:
        first = number * self.shard_samples
        indices = range(first, min(first + self.shard_samples, len(self.source)))
        rejected: list[Rejection] = []
        path = self.folder / f"{number:05d}.tar"

        def records() -> Iterator[RawRecord]:
            for at in range(0, len(indices), _CHUNK):
                chunk = indices[at : at + _CHUNK]
                for outcome in pool.map(self._try, chunk):
                    if isinstance(outcome, Rejection):
                        rejected.append(outcome.model_copy(update={"shard": path.name}))
                    else:
                        yield outcome
                progress(len(chunk))

        successes = write_shard(path, records())
        stats = ShardStats(
            count=len(indices),
            successes=successes,
            bytes=path.stat().st_size,
            sha256=sha256_file(path),
            status_dict={"success": successes, **Counter(entry.reason for entry in rejected)},
            rejected=tuple(rejected),
        )
        write_json(self._stats_path(number), stats.model_dump(mode="json"))
        note_kept()
        return stats

    def _try(self, index: int) -> RawRecord | Rejection:
        try:
            return self.source.record(index)
        except BadSample as error:
            return Rejection(index=index, name=self.source.name(index), reason=error.reason, detail=error.detail)

    def _kept(self, number: int) -> ShardStats | None:
        """The stats of a shard that an earlier run completed."""
        path = self._stats_path(number)
        if not path.exists():
            return None
        stats = decode(ShardStats, read_json(path), where=str(path), refuse=DataError)
        return stats if _size(self.folder / f"{number:05d}.tar") == stats.bytes else None

    def _give_up(self, stats: list[ShardStats], drops: Counter[str]) -> NoReturn:
        self._list_rejected(stats)
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(drops.items()))
        door = "; source.captions=none takes images without captions" if drops["caption_missing"] else ""
        looked = sum(entry.count for entry in stats)
        write_json(self.folder / OWNER, self._owner() | {_GAVE_UP: True})
        raise DataError(
            f"{drops.total()} of the first {looked} samples cannot be used ({reasons}), more than "
            f"max_drop_fraction={self.max_drop_fraction} of {len(self.source)}; they are listed in "
            f"{self.folder / REJECTED}, the first is {_shown(stats)}: mend the source, or raise max_drop_fraction{door}"
        )

    def _list_rejected(self, stats: list[ShardStats]) -> None:
        with atomic_write(self.folder / REJECTED, "w") as file:
            for entry in (entry for shard in stats for entry in shard.rejected):
                file.write(json.dumps(entry.model_dump(), sort_keys=True) + "\n")

    def _close(self, stats: list[ShardStats], drops: Counter[str]) -> RawManifest:
        manifest = RawManifest(
            fingerprint=self.fingerprint,
            source=self.described,
            samples=sum(entry.successes for entry in stats),
            drops=dict(sorted(drops.items())),
            shards=tuple(
                ShardRecord(file=f"{n:05d}.tar", bytes=entry.bytes, samples=entry.successes, sha256=entry.sha256)
                for n, entry in enumerate(stats)
            ),
            classes=self.classes,
            captions=self.captions,
        )
        if manifest.drops:
            self._list_rejected(stats)
        for leftover in self.folder.glob(".*.partial"):  # of killed runs; nothing is being written any more
            leftover.unlink(missing_ok=True)
        write_json(self.folder / MANIFEST, manifest.model_dump(mode="json"))
        return manifest

    def _require_ours(self) -> None:
        """Refuse a folder of anything else, or of the same source with other settings."""
        names = sorted(entry.name for entry in self.folder.glob("[!.]*"))
        if not names:
            return
        way_out = f"choose another data_dir, or delete {self.folder}"
        if OWNER not in names:
            raise DataError(f"{self.folder} holds {names[0]}, which prepare did not write; {way_out}")
        owner = read_json(self.folder / OWNER)
        if owner.get("fingerprint") != self.fingerprint and self._holds_samples():
            raise DataError(f"{self.folder} holds another data set ({self._difference(owner['source'])}); {way_out}")
        if owner.get("fingerprint") != self.fingerprint:
            return
        foreign = {name for name in names if name.endswith(".tar")} - {f"{n:05d}.tar" for n in range(self.shards)}
        if foreign:
            raise DataError(f"{self.folder} holds {min(foreign)}, which prepare did not write; {way_out}")

    def _holds_samples(self) -> bool:
        """Whether any sample was made here, by whatever settings, that is worth going on with."""
        if (self.folder / MANIFEST).exists():
            return True
        if read_json(self.folder / OWNER).get(_GAVE_UP):
            return False
        for path in self.folder.glob("[0-9]*.tar"):
            stats = path.with_name(f"{path.stem}_stats.json")
            if not stats.exists() or decode(ShardStats, read_json(stats), where=str(stats)).successes:
                return True
        return False

    def _forget_failed(self) -> None:
        """Remove what an earlier attempt with other settings left, which made no sample or gave up: a wrong root."""
        owner = self.folder / OWNER
        if not owner.exists() or read_json(owner).get("fingerprint") == self.fingerprint:
            return
        for stats in self.folder.glob("[0-9]*_stats.json"):
            (self.folder / f"{stats.name.removesuffix('_stats.json')}.tar").unlink(missing_ok=True)
            stats.unlink()
        for name in (OWNER, REJECTED):
            (self.folder / name).unlink(missing_ok=True)

    def _difference(self, before: dict[str, Any]) -> str:
        words = [
            f"{key}={before.get(key)!r} there, {value!r} now"
            for key, value in self.described.items()
            if before.get(key) != value
        ]
        return "; ".join(words) or "with another seed, shard_samples or content"

    def _stats_path(self, number: int) -> Path:
        return self.folder / f"{number:05d}_stats.json"


def _shown(stats: list[ShardStats]) -> str:
    first = next(entry for shard in stats for entry in shard.rejected)
    return f"{first.name} ({first.reason}: {first.detail})"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
