"""What a finished unit is: a shard, what was left out, and the record that is renamed into place last."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import NonNegativeInt

from tokscale.base.config import Config, StoredName
from tokscale.base.errors import DataError
from tokscale.base.files import atomic_write, fsync_folder, remove_partials, storage_errors, write_json
from tokscale.data.tokenization.plan import Plan, Unit
from tokscale.data.tokens.blocks import ShardRecord, ShardWriter
from tokscale.data.tokens.manifest import read_record

NAME = "tokens"


class BadInput(Config):
    """An input shard that a unit was made without."""

    input: NonNegativeInt
    """Its number in the plan."""
    path: StoredName
    why: str
    samples: NonNegativeInt | None = None
    """As stated by its maker; None when unknown."""
    bytes: NonNegativeInt
    """Of the file as it was found; 0 when it was not there."""
    mtime_ns: NonNegativeInt
    """When that file was last written."""


class UnitRecord(Config):
    """The commit of a unit, `tokens-000000.json`: with it, and a shard of its size, the unit is done."""

    format: Literal["tokscale-unit"] = "tokscale-unit"
    version: Literal[1] = 1
    run: str
    """Fingerprint of the tokenization."""
    unit: NonNegativeInt
    samples_in: NonNegativeInt
    """Samples in the inputs: those in the shard and those left out."""
    drops: dict[str, int]
    """Samples that were left out, by reason."""
    labels: NonNegativeInt | None = None
    """One more than the largest class label, where labels are stored."""
    bad_inputs: tuple[BadInput, ...] = ()
    """Inputs that could not be read: all else of the unit is there."""
    noted: dict[str, int] = {}
    """What a person should know of, by the words of `notes`."""
    shard: ShardRecord


@dataclass(frozen=True)
class Rejected:
    """A sample that was left out, as it is listed in `quarantine/`."""

    key: str
    input: str
    offset: int
    """Of the sample's first byte in the input shard."""
    reason: str
    detail: str
    """The exception, or the value that was refused."""


class UnitWriter:
    """A unit while it is made: hidden files that become visible only by `commit`."""

    def __init__(self, folder: Path, unit: Unit, run: str, header: Mapping[str, Any], file: IO[bytes], partial: Path):
        self.folder, self.unit, self.run, self.partial = folder, unit, run, partial
        self.samples_in = 0
        self.rejected: list[Rejected] = []
        self.kept: list[Rejected] = []
        """Samples that were kept in spite of damage, and are listed all the same."""
        self.bad_inputs: list[BadInput] = []
        self.noted: Counter[str] = Counter()
        self.labels: int | None = None
        self._file = file
        self._shard = ShardWriter(file, header)

    def add(self, block: bytes, samples: int) -> None:
        """Append a packed block.

        Raises:
            StorageError: When the file system refuses.
        """
        with storage_errors(self.folder / shard_name(self.unit.number)):
            self._shard.add(block, samples)

    @property
    def drops(self) -> dict[str, int]:
        """Rejected samples by reason."""
        return dict(sorted(Counter(entry.reason for entry in self.rejected).items()))

    def list_rejected(self) -> Path:
        """Write down each rejected or damaged sample, with the reason; no file where there is none."""
        path = quarantine_path(self.folder, self.unit.number)
        if not self.rejected and not self.kept:
            path.unlink(missing_ok=True)
            return path
        with atomic_write(path, "w") as file:
            file.writelines(json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in self.rejected)
            file.writelines(json.dumps(asdict(entry) | {"kept": True}, sort_keys=True) + "\n" for entry in self.kept)
        return path

    def commit(self) -> UnitRecord:
        """Put everything in place, the record last.

        Raises:
            RuntimeError: When another worker replaced the shard meanwhile; the unit must be done again.
            StorageError: When the file system refuses.
        """
        name = shard_name(self.unit.number)
        with storage_errors(self.folder / name):
            record = UnitRecord(
                run=self.run,
                unit=self.unit.number,
                samples_in=self.samples_in,
                drops=self.drops,
                labels=self.labels,
                bad_inputs=tuple(self.bad_inputs),
                noted=dict(sorted(self.noted.items())),
                shard=self._shard.finish(name),
            )
            self._file.flush()
            os.fsync(self._file.fileno())
            own = os.fstat(self._file.fileno()).st_ino
            os.replace(self.partial, self.folder / name)
            fsync_folder(self.folder)
        self.list_rejected()
        write_json(record_path(self.folder, self.unit.number), record.model_dump(mode="json"))
        # Two workers can be here at once, when one was taken for dead. On a GPU their shards may differ, so a record
        # may only stand beside the shard that it describes.
        if (self.folder / name).stat().st_ino != own:
            invalidate(self.folder, self.unit.number)
            raise RuntimeError(f"{self.folder / name}: another worker replaced it; the unit is done again")
        return record


@contextmanager
def unit_writer(folder: Path, unit: Unit, run: str, header: Mapping[str, Any], worker: str) -> Iterator[UnitWriter]:
    """Open a unit for writing; unless it is committed, nothing of it remains.

    Raises:
        StorageError: When the file system refuses.
    """
    partial = folder / f".{shard_name(unit.number)}.{worker}.partial"
    with storage_errors(folder / shard_name(unit.number)):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(partial, "wb")  # noqa: SIM115 - closed below, when it may have been renamed
    try:
        yield UnitWriter(folder, unit, run, header, file, partial)
    finally:
        file.close()
        partial.unlink(missing_ok=True)


def shard_name(unit: int) -> str:
    """File name of a unit's shard."""
    return f"{NAME}-{unit:06d}.tar"


def record_path(folder: Path, unit: int) -> Path:
    """Where a unit's record lies."""
    return folder / f"{NAME}-{unit:06d}.json"


def quarantine_path(folder: Path, unit: int) -> Path:
    """Where the samples are listed that a unit left out."""
    return folder / "quarantine" / f"{unit:06d}.jsonl"


def read_unit(folder: Path, unit: int) -> UnitRecord:
    """A unit's record.

    Raises:
        DataError: When there is none, or it was damaged.
    """
    return read_record(UnitRecord, record_path(folder, unit))


def is_done(folder: Path, plan: Plan, unit: int) -> bool:
    """Whether a unit has, in every bucket, a record of this tokenization and a shard of the size that it states."""
    return bool(_records(folder, plan, unit))


def _records(folder: Path, plan: Plan, unit: int) -> list[UnitRecord]:
    """A unit's records, one for each bucket; none when it is not done. Each is read once, as it may be invalidated."""
    records = []
    for place in (folder / bucket for bucket in plan.buckets):
        try:
            record = read_unit(place, unit)
            whole = record.run == plan.run and (place / record.shard.file).stat().st_size == record.shard.bytes
        except (DataError, FileNotFoundError):
            return []
        if not whole:
            return []
        records.append(record)
    return records


def invalidate(folder: Path, unit: int) -> None:
    """Make a unit undone."""
    record_path(folder, unit).unlink(missing_ok=True)


def sweep(folder: Path, plan: Plan, unit: int) -> None:
    """Remove what killed workers left half written of a unit."""
    for bucket in plan.buckets:
        for path in (folder / bucket).glob(f".{shard_name(unit)}.*.partial"):
            path.unlink(missing_ok=True)


def sweep_all(folder: Path, plan: Plan) -> None:
    """Remove all that killed workers left half written; when nobody works any more."""
    places = [folder / bucket / name for bucket in plan.buckets for name in ("", "quarantine")]
    for place in (*places, folder / "timings"):
        remove_partials(place)


def recorded(folder: Path, plan: Plan) -> set[int]:
    """Units that have a record in the bucket where it comes last; one look into the folder. See `is_done`."""
    last = folder / plan.buckets[-1]
    names = {name for name in os.listdir(last) if name.endswith(".json")} if last.exists() else set()
    return {unit.number for unit in plan.units if record_path(last, unit.number).name in names}


def finished(folder: Path, plan: Plan) -> list[UnitRecord]:
    """The records of all units that are done, in order; one for each bucket."""
    first = folder / plan.buckets[0]
    present = {path.name for path in first.glob(f"{NAME}-*.json")}
    return [
        record
        for unit in plan.units
        if record_path(first, unit.number).name in present
        for record in _records(folder, plan, unit.number)
    ]


def total_notes(records: Sequence[UnitRecord]) -> dict[str, int]:
    """What all units noted, see `notes`."""
    totals: Counter[str] = Counter()
    for record in records:
        totals.update(record.noted)
    return dict(sorted(totals.items()))


def total_drops(records: Sequence[UnitRecord]) -> dict[str, int]:
    """Samples left out by all units, by reason."""
    totals: Counter[str] = Counter()
    for record in records:
        totals.update(record.drops)
    return dict(sorted(totals.items()))
