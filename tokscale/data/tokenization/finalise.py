"""Closing a data set, and saying how far it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokscale.base.errors import DataError
from tokscale.base.files import read_json
from tokscale.data.raw.places import RawPlace
from tokscale.data.tokenization.leases import Attempts, Leases
from tokscale.data.tokenization.plan import Outcome, Plan, Unit
from tokscale.data.tokenization.units import BadInput, UnitRecord, finished, total_drops
from tokscale.data.tokens.manifest import (
    MANIFEST,
    TextRecord,
    TokenDataset,
    TokenManifest,
    write_manifest,
)
from tokscale.data.tokens.views import FOLDER, View, ViewRule, build_view


@dataclass(frozen=True)
class Progress:
    """How far a tokenization is."""

    units: int
    done: int
    active: dict[int, str]
    """Units in work, by whom."""
    failed_for_good: dict[int, str]
    """Units that are not tried any more, and why."""
    samples: int
    """In finished shards."""
    expected: int | None
    """In all inputs, None when their maker did not count."""
    drops: dict[str, int]
    bad_inputs: tuple[BadInput, ...] = ()
    """Input shards that the finished units were made without."""

    @property
    def complete(self) -> bool:
        """Whether every unit is done."""
        return self.done == self.units

    def lines(self) -> list[str]:
        """For a person."""
        share = f" of {self.expected}" if self.expected is not None else ""
        found = [
            f"units: {self.done} of {self.units} done, {len(self.active)} in work, "
            f"{len(self.failed_for_good)} failed for good"
        ]
        found.append(f"samples: {self.samples}{share}; left out: {_counts(self.drops) or 'none'}")
        found += [f"  unit {unit}: in work by {owner}" for unit, owner in self.active.items()]
        found += [f"  unit {unit}: failed for good, {why}" for unit, why in self.failed_for_good.items()]
        found += [f"  input {bad.path}: left out, {bad.why}" for bad in self.bad_inputs]
        return found


def bad_inputs(plan: Plan, records: Sequence[UnitRecord]) -> tuple[BadInput, ...]:
    """The input shards that finished units were made without, and that were not planned anew since."""
    latest = plan.latest
    found = {bad.input: bad for record in records for bad in record.bad_inputs if latest.get(bad.path) == bad.input}
    return tuple(found[number] for number in sorted(found))


def outcome(folder: Path, raw: RawPlace, plan: Plan, *, retry: bool = False) -> Outcome:
    """What became of the inputs of a plan.

    Args:
        folder: Of token shards.
        raw: Of input shards.
        plan: Whose inputs.
        retry: Take every bad input for a mended one.
    """
    records = finished(folder, plan)
    bad = bad_inputs(plan, records)
    done = {number for record in records for number in plan.units[record.unit].numbers}
    mended = {found.input for found in bad if retry or raw.seen(found.path) != (found.bytes, found.mtime_ns)}
    unread = {found.input for record in records for found in record.bad_inputs}
    return Outcome(frozenset(done - unread), frozenset(found.input for found in bad), frozenset(mended))


def progress_of(
    folder: Path, plan: Plan, leases: Leases, attempts: Attempts, inputs: Callable[[Unit], str] = lambda unit: ""
) -> Progress:
    """Look at a folder; changes nothing and needs no tokenizer. `inputs` says what a unit's input files are now."""
    records = finished(folder, plan)
    done = {record.unit for record in records}
    active = {unit: owner for unit, owner in leases.active().items() if unit not in done}
    failed_for_good = {
        unit.number: why
        for unit in plan.units
        if unit.number not in done
        and unit.number not in active
        and (why := attempts.failed_for_good(unit.number, inputs(unit)))
    }
    return Progress(
        units=len(plan.units),
        done=len(done),
        active=active,
        failed_for_good=failed_for_good,
        samples=sum(record.shard.samples for record in records),
        expected=_expected(plan, records),
        drops=total_drops(records),
        bad_inputs=bad_inputs(plan, records),
    )


def _expected(plan: Plan, records: Sequence[UnitRecord]) -> int | None:
    # A mended input counts under its new number only.
    bad = {found.input for record in records for found in record.bad_inputs}
    counts = [shard.samples for number, shard in enumerate(plan.inputs) if number not in bad]
    return None if None in counts else sum(filter(None, counts))


def closed(folder: Path, plan: Plan) -> bool:
    """Whether there is a manifest of just the units that are done, in every bucket that got any image."""
    return all(_is_closed(folder / bucket, plan.of(bucket)) for bucket in plan.buckets)


def _is_closed(folder: Path, plan: Plan) -> bool:
    records = finished(folder, plan)
    if plan.is_bucket and not sum(record.shard.samples for record in records):
        return not (folder / MANIFEST).exists()
    try:
        manifest = TokenDataset(folder).manifest
    except DataError:
        return False
    hashes = [record.shard.sha256 for record in records]
    return manifest.run == plan.run and [shard.sha256 for shard in manifest.shards] == hashes


def finalise(
    folder: Path, plan: Plan, views: Mapping[str, ViewRule], *, allow_missing: bool, drop_bad_inputs: bool = False
) -> tuple[dict[str, TokenManifest], bool]:
    """Write the manifest and the views of all finished units, in every bucket that got any image.

    Args:
        folder: Of token shards.
        plan: All of whose units should be done.
        views: Rules by name.
        allow_missing: Close without the units that are not done, and without bad inputs.
        drop_bad_inputs: Close without bad inputs.

    Returns:
        The manifests by bucket, and whether anything had to be written.

    Raises:
        DataError: When units are missing, or nothing was made at all.
    """
    records = finished(folder, plan)
    missing = sorted({unit.number for unit in plan.units} - {record.unit for record in records})
    if missing and not allow_missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(plan.units)} units are not done ({_some(missing)}); run "
            "`tokscale tokenize`, see `tokscale tokenize action=status`, or close without them by allow_missing=true"
        )
    bad = bad_inputs(plan, records)
    if bad and not (allow_missing or drop_bad_inputs):
        raise DataError(f"{folder}: {shown_bad_inputs(bad)}")
    if not sum(record.shard.samples for record in records):
        raise DataError(f"{folder}: there is no sample to close; look at the quarantine folder for the reasons")
    manifests: dict[str, TokenManifest] = {}
    written = False
    for bucket in plan.buckets:
        part = finished(folder / bucket, plan.of(bucket))
        if sum(record.shard.samples for record in part):
            manifests[bucket], new = _close(folder / bucket, plan.of(bucket), part, views)
            written |= new
    return manifests, written


def shown_bad_inputs(bad: Sequence[BadInput]) -> str:
    """What is wrong with which inputs, and what helps."""
    listed = "\n".join(f"  {found.path}: {found.why}" for found in bad[:20])
    more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
    return (
        f"{len(bad)} input shards cannot be used, all else is done:\n{listed}{more}\n"
        "mend or replace them and run the same command again, which makes nothing twice; or leave them out by "
        "on_bad_shard=drop"
    )


def _close(
    folder: Path, plan: Plan, records: Sequence[UnitRecord], views: Mapping[str, ViewRule]
) -> tuple[TokenManifest, bool]:
    values: dict[str, Any] = {
        "run": plan.run,
        "streams": plan.streams,
        "variants": plan.identity["variants"]["count"],
        "text": TextRecord(**plan.identity["text"]) if plan.identity["text"] else None,
        "drops": total_drops(records),
        "labels": max(record.labels or 0 for record in records) if plan.identity.get("labels") else None,
    }
    shards = [record.shard for record in records]
    written = not _is_closed(folder, plan)
    if written:
        write_manifest(folder, shards, **values)
    dataset = TokenDataset(folder)
    for name, rule in views.items():
        written |= _refresh_view(dataset, name, rule)
    return dataset.manifest, written


def _refresh_view(dataset: TokenDataset, name: str, rule: ViewRule) -> bool:
    path = dataset.folder / FOLDER / f"{name}.json"
    try:
        View(dataset, name)
        if read_json(path).get("rule") == rule.model_dump(mode="json"):
            return False
    except (DataError, KeyError):
        pass
    build_view(dataset, name, rule)
    return True


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def _some(numbers: list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
