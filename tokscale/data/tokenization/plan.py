"""What is to be done, decided once: input shards grouped into units, hashed, extendable, never renumbered.

The plan is a chain of parts, `plan/000.json`, `plan/001.json`, ...: each names the hash of the one before, and is
written under a name that must not exist yet, so that any number of workers may plan at the same time.
"""

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, SerializerFunctionWrapHandler, model_serializer

from tokscale.base.config import Config, StoredName, fingerprint
from tokscale.base.errors import DataError
from tokscale.base.files import fsync_folder, storage_errors
from tokscale.data.tokens.manifest import StreamRecord, read_record

FOLDER = "plan"
_ASSUMED_BYTES = 50_000
"""Of a sample, where nobody counted: only for grouping."""


class InputShard(Config):
    """One shard of images and captions, as it was when it was planned."""

    path: StoredName
    """Relative to the folder of raw shards."""
    bytes: NonNegativeInt
    """Of the file, or as its maker stated; 0 when there is no such file."""
    samples: NonNegativeInt | None = None
    """As stated by its maker; None when unknown."""
    tag: str = ""
    """What a store says of the content, where the shard lies behind an address: a checksum, an ETag, a time."""

    @property
    def content(self) -> tuple[int, str]:
        """Changes with the file."""
        return self.bytes, self.tag

    @model_serializer(mode="wrap")
    def _without_tag(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A shard of this machine has none, and plans of before are hashed without.
        return {name: value for name, value in inner(self).items() if name != "tag" or value}


class PlanPart(Config):
    """Inputs and units that were added at one time."""

    format: Literal["tokscale-plan"] = "tokscale-plan"
    version: Literal[1] = 1
    run: str
    """Fingerprint of the tokenization."""
    identity: dict[str, Any]
    """What the fingerprint is of."""
    previous: str
    """Hash of the part before; empty for the first."""
    first_input: NonNegativeInt
    """Number of the first of these inputs in the whole plan."""
    inputs: tuple[InputShard, ...]
    first_unit: NonNegativeInt
    units: tuple[NonNegativeInt, ...]
    """How many consecutive inputs each unit takes."""


class Unit:
    """A piece of work: some consecutive inputs, one token shard."""

    def __init__(self, number: int, first_input: int, inputs: Sequence[InputShard]):
        self.number, self.first_input, self.inputs = number, first_input, tuple(inputs)

    @property
    def numbers(self) -> range:
        """Of its inputs, in the whole plan."""
        return range(self.first_input, self.first_input + len(self.inputs))

    @property
    def expected(self) -> int | None:
        """Samples as stated by the inputs' maker, None when one is unknown."""
        counts = [shard.samples for shard in self.inputs]
        return None if None in counts else sum(filter(None, counts))


class Plan:
    """All parts together: of the whole tokenization, or as it is seen from one of its aspect buckets."""

    def __init__(self, parts: Sequence[PlanPart], bucket: str = ""):
        assert parts
        self.parts, self._bucket = tuple(parts), bucket
        self.run, self.identity = parts[0].run, parts[0].identity
        self.inputs = tuple(shard for part in parts for shard in part.inputs)
        self.units: list[Unit] = []
        at = 0
        for size in (size for part in parts for size in part.units):
            self.units.append(Unit(len(self.units), at, self.inputs[at : at + size]))
            at += size

    @property
    def buckets(self) -> tuple[str, ...]:
        """The folders below that of token shards which each hold one data set; `""` alone is that folder itself."""
        names = tuple(bucket["name"] for bucket in self.identity.get("buckets", ()))
        return names if names and not self._bucket else ("",)

    def of(self, bucket: str) -> "Plan":
        """The same units with the streams of one bucket, for the functions that look at its folder alone."""
        return Plan(self.parts, bucket) if bucket else self

    @property
    def is_bucket(self) -> bool:
        """Whether this is one bucket's view, which may have no images at all."""
        return bool(self._bucket)

    @property
    def streams(self) -> dict[str, StreamRecord]:
        """What is stored in this bucket, or where there are none."""
        tokenizers = {bucket["name"]: bucket["tokenizers"] for bucket in self.identity.get("buckets", ())}
        chosen = tokenizers[self._bucket] if self._bucket else self.identity["tokenizers"]
        return {name: StreamRecord(**stream) for name, stream in chosen.items()}

    @property
    def latest(self) -> dict[str, int]:
        """By path, the number under which an input was planned last: one that was mended has several."""
        return {shard.path: number for number, shard in enumerate(self.inputs)}

    @property
    def expected(self) -> int | None:
        """Samples of all inputs, None when one is unknown."""
        counts = [unit.expected for unit in self.units]
        return None if None in counts else sum(filter(None, counts))


def read_plan(folder: Path) -> Plan | None:
    """The plan of a folder of token shards, None when there is none.

    Raises:
        DataError: When a part was edited, or is not the continuation of the one before.
    """
    parts: list[PlanPart] = []
    previous = ""
    for number in count():
        path = folder / FOLDER / f"{number:03d}.json"
        if not path.exists():
            break
        part = read_record(PlanPart, path)
        if part.previous != previous or (parts and part.run != parts[0].run):
            raise DataError(f"{path}: does not continue the plan before it; it was edited. {_START_OVER}")
        previous = fingerprint(part)
        parts.append(part)
    return Plan(parts) if parts else None


@dataclass(frozen=True)
class Outcome:
    """What became of a plan's inputs so far."""

    read: frozenset[int] = frozenset()
    """Numbers of the inputs that finished units hold."""
    bad: frozenset[int] = frozenset()
    """Numbers of those that finished units were made without."""
    mended: frozenset[int] = frozenset()
    """Numbers of the bad ones that are other files by now."""


def make_plan(
    folder: Path,
    identity: dict[str, Any],
    listing: Callable[[], Sequence[InputShard]],
    unit_samples: int,
    outcome: Callable[[Plan], Outcome] = lambda plan: Outcome(),
) -> Plan:
    """The plan for these inputs: a new one, the one that is there, or that one with units for new inputs.

    Args:
        folder: Of token shards.
        identity: What the fingerprint is of.
        listing: Says which inputs there are, in order. Asked after the plan is read, so that an input which another
            worker has just planned is seen, too.
        unit_samples: How many samples a unit should have, roughly.
        outcome: Says what became of the inputs of a plan. A mended input is planned anew, under a further number.

    Raises:
        DataError: When the folder was planned for another tokenization, or an input that was read is another file now.
    """
    while True:
        plan, inputs = read_plan(folder), listing()
        known: dict[str, InputShard] = {}
        if plan is not None:
            _require_same(folder, plan, identity)
            became = outcome(plan)
            _require_unchanged(folder, plan, became.read, inputs)
            latest = plan.latest
            listed = {shard.path: shard.content for shard in inputs}
            again = {n for n in became.bad if listed.get(plan.inputs[n].path) != plan.inputs[n].content} | became.mended
            known = {path: plan.inputs[number] for path, number in latest.items() if number not in again}
        new = [shard for shard in inputs if shard.path not in known]
        if plan is not None and not new:
            return plan
        if not new:
            raise DataError(f"{folder}: there are no input shards to plan; run `tokscale prepare` or set `raw`")
        part = PlanPart(
            run=fingerprint(identity),
            identity=identity,
            previous=fingerprint(plan.parts[-1]) if plan else "",
            first_input=len(plan.inputs) if plan else 0,
            inputs=tuple(new),
            first_unit=len(plan.units) if plan else 0,
            units=grouped(new, unit_samples),
        )
        _publish(folder / FOLDER / f"{len(plan.parts) if plan else 0:03d}.json", part)


def grouped(inputs: Sequence[InputShard], unit_samples: int) -> tuple[int, ...]:
    """How many inputs each unit has, of about so many samples."""
    sizes = [0]
    samples = 0
    for shard in inputs:
        weight = shard.samples if shard.samples is not None else max(1, shard.bytes // _ASSUMED_BYTES)
        if sizes[-1] and samples + weight > unit_samples:
            sizes.append(0)
            samples = 0
        sizes[-1] += 1
        samples += weight
    return tuple(sizes)


def forget_plan(folder: Path) -> None:
    """Remove a plan of which nothing was made, and what was noted of its failures."""
    for path in (*(folder / FOLDER).glob("*.json"), *(folder / "attempts").glob("*.jsonl")):
        if path.stem.isdecimal():  # either folder may be a link to where others keep things, too
            path.unlink(missing_ok=True)


def _publish(path: Path, part: PlanPart) -> None:
    # A link fails when the name exists: of several planners one wins, and the others read what it wrote.
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
        with open(partial, "w") as file:
            json.dump(part.model_dump(mode="json"), file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink()
        fsync_folder(path.parent)


def _require_same(folder: Path, plan: Plan, identity: dict[str, Any]) -> None:
    if plan.run == fingerprint(identity):
        return
    changed = sorted(
        f"{name} {_short(plan.identity.get(name))} -> {_short(identity.get(name))}"
        for name in plan.identity.keys() | identity.keys()
        if plan.identity.get(name) != identity.get(name)
    )
    raise DataError(
        f"{folder}: holds the tokenization {plan.run[:12]}, this one is {fingerprint(identity)[:12]}. "
        f"What differs: {'; '.join(changed)}. Set it as it was, or choose another folder with tokens=FOLDER"
    )


def _require_unchanged(folder: Path, plan: Plan, read: frozenset[int], inputs: Sequence[InputShard]) -> None:
    # What is gone is not needed any more. What was not read yet may have changed: its unit is made without it, and it
    # is planned anew.
    found = {shard.path: shard.content for shard in inputs}
    for path, number in plan.latest.items():
        planned = plan.inputs[number].content
        if number in read and found.get(path, planned) != planned:
            (before, tag), (now, other) = planned, found[path]
            tags = f" (its tag was {tag}, it is {other})" if tag != other else ""
            raise DataError(
                f"{folder}: the input {path} had {before} bytes when it was read and has {now} now{tags}; put the "
                f"old one back, or give redo_changed=true to make again what came of it. {_START_OVER}"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 160 else f"{text[:157]}..."


_START_OVER = "To start over, remove the folder or choose another one with tokens=FOLDER"
