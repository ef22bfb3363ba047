"""Train, break something, restart, and look what came of it: one round after another, each in forked processes.

As a program: `python checkpoint_rounds.py random SEED COUNT OUT.json`, or
`python checkpoint_rounds.py every-call {whole-run | last-save} FAULT OUT.json`. It forks a fresh process for every
run, so that a round costs a fraction of a second and the parent, which never computes, never holds a thread.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - the first optimizer would import it in every child anew

from tokscale.base.errors import TokscaleError
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.status import describe
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import FaultyDisk
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, ScheduleConfig
from tokscale.engine.testing import snapshot, toy, train

TOTAL = 8


@dataclass(frozen=True)
class Outcome:
    """How one process of a round ended."""

    code: int
    """Exit code; negative for a signal."""
    seconds: float
    calls: int = 0
    """Of the file layer."""
    before_last_save: int = 0
    """Of those, up to the last save."""
    resumed: int | None = None
    """The step it took up."""
    claimed: int = 0
    """The last step that it reported as saved."""
    digest: str = ""
    """Of weights, moments, averages and counters at the end."""
    message: str = ""


def training(folder: Path, disk: FaultyDisk, *, background: bool, seed: int, note: Callable[..., None]) -> None:
    """The run that is disturbed: a toy model, a save every second step, resumed from the newest checkpoint."""
    comm = Comm(ProcessEnv())
    engine = build_engine(
        "model",
        toy(seed, dim=6, blocks=1, uses=(0, 0)),
        config=EagerConfig(ema=(0.9,)),
        optimizer=AdamWConfig(lr=0.05),
        schedule=ScheduleConfig(kind="linear"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=4,
        total_steps=TOTAL,
    )
    config = CheckpointConfig(every_steps=2, keep_last=2, async_save=background)
    with CheckpointStore(folder / "checkpoints", config, comm, disk) as store:
        found = store.resume({"model": engine}, lambda checkpoint: engine.load(checkpoint.source("model")))
        first = 0 if found is None else found.state["next"]
        note(resumed=first)
        for step in range(first, TOTAL):
            train(engine, comm, [step], batch=4)
            done = store.poll()
            if store.due(step + 1):
                note(before_last_save=disk.count)
                done = store.save(step + 1, {"model": engine}, {"next": step + 1}) or done
            if done is not None:
                note(claimed=int(done.name.removeprefix("step_")))
    state = snapshot(engine, comm)
    digest = hashlib.sha256(json.dumps(engine.scalars(), sort_keys=True).encode())
    for key, value in sorted(state.whole().items()):
        digest.update(repr(key).encode() + value.numpy().tobytes())
    note(claimed=TOTAL, digest=digest.hexdigest(), calls=disk.count)


def process(
    folder: Path,
    fault: str = "none",
    at: int = -1,
    *,
    background: bool = False,
    seed: int = 1,
    kill_s: float | None = None,
) -> Outcome:
    """Fork a process that trains in `folder`; optionally kill it after `kill_s` seconds."""
    notes = folder / "notes"
    notes.write_text("")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_child(folder, FaultyDisk(fault, at), notes, background, seed))
    if kill_s is not None:
        time.sleep(kill_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    values: dict[str, Any] = {}
    for line in notes.read_text().splitlines():
        values |= json.loads(line)
    return Outcome(code=os.waitstatus_to_exitcode(status), seconds=time.monotonic() - began, **values)


def _child(folder: Path, disk: FaultyDisk, notes: Path, background: bool, seed: int) -> int:
    descriptor = os.open(notes, os.O_WRONLY | os.O_APPEND)

    def note(**values: Any) -> None:
        os.write(descriptor, (json.dumps(values) + "\n").encode())

    try:
        training(folder, disk, background=background, seed=seed, note=note)
    except TokscaleError as error:
        note(message=str(error))
        return error.exit_code
    except BaseException as error:
        note(message=repr(error))
        return 1
    return 0


# ----------------------------------------------------------------------------------------------------- damage


def _pick(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def truncate(draw: random.Random, folder: Path, other: Path) -> None:
    del other
    path = _pick(draw, folder)
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip(draw: random.Random, folder: Path, other: Path) -> None:
    del other
    path = _pick(draw, folder)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def delete(draw: random.Random, folder: Path, other: Path) -> None:
    del other
    _pick(draw, folder).unlink()


def mix_file(draw: random.Random, folder: Path, other: Path) -> None:
    del draw
    name = "model.rank_00000.safetensors"  # the state of two runs may well be the same
    shutil.copyfile(other / folder.name / name, folder / name)


def mix_folder(draw: random.Random, folder: Path, other: Path) -> None:
    del draw
    shutil.rmtree(folder)
    shutil.copytree(other / folder.name, folder)


def empty_latest(draw: random.Random, folder: Path, other: Path) -> None:
    del draw, other
    (folder.parent / "latest").write_text("")


DAMAGES = {function.__name__: function for function in (truncate, flip, delete, mix_file, mix_folder, empty_latest)}
HARMLESS = {"empty_latest"}


# ----------------------------------------------------------------------------------------------------- rounds


@dataclass(frozen=True)
class Reference:
    """What undisturbed runs do, and a finished run of another seed to take files from."""

    digest: str
    calls: int
    before_last_save: int
    """Calls of the file layer up to the last save."""
    seconds: float
    other: Path


def reference(folder: Path) -> Reference:
    """Run twice undisturbed."""
    for name in ("reference", "other"):
        (folder / name).mkdir()
    mine, other = process(folder / "reference"), process(folder / "other", seed=2)
    assert (mine.code, other.code) == (0, 0), (mine, other)
    assert mine.digest != other.digest
    return Reference(mine.digest, mine.calls, mine.before_last_save, mine.seconds, folder / "other" / "checkpoints")


def judge(folder: Path, ref: Reference, first: Outcome, damaged: set[int], background: bool) -> dict[str, Any]:
    """Restart, and say whether it did what it must.

    Args:
        folder: The run folder as the first process and the damage left it.
        ref: The undisturbed run.
        first: How the first process ended.
        damaged: Steps whose checkpoints were damaged from outside.
        background: Whether saves are asynchronous.

    Returns:
        A row of the report; `fault` in it is empty when all is well.
    """
    infos = describe(folder / "checkpoints", verify="full")
    torn = [info.step for info in infos if info.step not in damaged and not (info.complete and info.hashes_hold)]
    sound = [info.step for info in infos if info.step not in damaged]
    second = process(folder, background=background)
    wrong = []
    if torn:
        wrong.append(f"checkpoints {torn} are torn under their final names")
    if not damaged and max(sound, default=0) < first.claimed:
        wrong.append(f"step {first.claimed} was reported as saved, the newest sound one is {max(sound, default=0)}")
    if infos and not sound:
        verdict = "refused"
        if second.code != 78 or "can be used" not in second.message:
            wrong.append(f"no usable checkpoint, but the restart ended with {second.code}: {second.message}")
    else:
        verdict = "bit-equal"
        if second.code != 0 or second.digest != ref.digest:
            wrong.append(f"the restart ended with {second.code} {second.message} and another state")
        if second.resumed != max(sound, default=0):
            wrong.append(f"resumed from {second.resumed}, the newest sound checkpoint is {max(sound, default=0)}")
    if first.code not in (0, -signal.SIGKILL, 74):
        wrong.append(f"the first process ended with {first.code}: {first.message}")
    ends = {"first_exit": first.code, "claimed": first.claimed, "resumed": second.resumed}
    return ends | {"damaged": sorted(damaged), "outcome": verdict, "wrong": wrong}


def random_round(folder: Path, ref: Reference, seed: int) -> dict[str, Any]:
    """One round whose faults are drawn from `seed`."""
    draw = random.Random(seed)
    background = draw.random() < 0.5
    fault = draw.choice(["kill-before", "kill-after", "kill-any-time", "full", "refused", "none", "none"])
    at = draw.randrange(ref.calls)
    if fault == "kill-any-time":
        first = process(folder, background=background, kill_s=draw.uniform(0.3, 1.0) * ref.seconds)
    else:
        first = process(folder, fault, at, background=background)
    folders = sorted((folder / "checkpoints").glob("step_*"))
    damage, damaged = "", set()
    if folders and (fault == "none" or draw.random() < 0.3):
        damage = draw.choice(sorted(DAMAGES))
        victims = folders if draw.random() < 0.25 else folders[-1:]
        for victim in victims:
            if not (ref.other / victim.name).exists() and damage.startswith("mix"):
                continue  # retention of the other run took that step away
            DAMAGES[damage](draw, victim, ref.other)
            damaged |= set() if damage in HARMLESS else {int(victim.name.removeprefix("step_"))}
    row = {"seed": seed, "async": background, "fault": fault, "call": at, "damage": damage}
    return row | judge(folder, ref, first, damaged, background)


def every_call_rounds(
    base: Path, ref: Reference, stretch: str, fault: str
) -> Iterator[Callable[[Path], dict[str, Any]]]:
    """One round for each system call of the file layer, in a whole run or from its last checkpoint but one on."""
    start = base / "start"
    start.mkdir()
    calls = ref.calls
    if stretch == "last-save":
        process(start, "kill-before", ref.before_last_save)
        shutil.copytree(start, base / "counted")
        calls = process(base / "counted").calls

    def play(folder: Path, at: int) -> dict[str, Any]:
        shutil.copytree(start, folder, dirs_exist_ok=True)
        first = process(folder, fault, at)
        return {"fault": fault, "call": at} | judge(folder, ref, first, set(), background=False)

    for at in range(calls):
        yield partial(play, at=at)


def main(arguments: list[str]) -> None:
    """Run the rounds asked for and write their outcomes."""
    kind, *rest, out = arguments
    # In memory where possible: a killed process loses no written page, so waiting for a disk would prove nothing.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        base = Path(name)
        ref = reference(base)
        plan: Iterable[Callable[[Path], dict[str, Any]]]
        if kind == "random":
            start, count = map(int, rest)
            plan = [partial(random_round, ref=ref, seed=seed) for seed in range(start, start + count)]
        else:
            plan = every_call_rounds(base, ref, *rest)
        rows = []
        for number, play in enumerate(plan):
            folder = base / str(number)
            folder.mkdir()
            rows.append(play(folder))
            shutil.rmtree(folder)
    report = {"calls_of_one_run": ref.calls, "reference": dataclasses.asdict(ref) | {"other": ""}, "rounds": rows}
    Path(out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
