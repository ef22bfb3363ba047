"""Fail every call of a save with every error of a file system, and look what is left.

    python tests/reports/faults_cpu_202611/saves.py OUT.json

After each fault the newest checkpoint must be a whole one and bit-equal to what was saved as that step; the failure, if
it is one, must be a `StorageError`; and the next save must succeed and leave nothing of the failed one behind.
"""

import errno
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tokscale.base.errors import StorageError
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.disk import Disk
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import CALLS, Flat, alone, tensors

NUMBERS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ENOENT", "ESTALE", "ENOTDIR", "EEXIST", "EBUSY")


class FailingDisk(Disk):
    """The file layer that answers one call, or all from there on, with an error."""

    def __init__(self, number: int = 0, at: int = -1, *, lasting: bool = False):
        self.number, self.at, self.lasting, self.count, self.hit = number, at, lasting, 0, ""


def _failing(name: str) -> Any:
    real = getattr(Disk, name)

    def call(self: FailingDisk, *arguments: Any) -> Any:
        here, self.count = self.count, self.count + 1
        if self.at >= 0 and (here == self.at or (self.lasting and here > self.at)) and name != "close":
            self.hit = self.hit or name
            raise OSError(self.number, os.strerror(self.number), f"{arguments[0]}")
        return real(self, *arguments)

    return call


for _name in CALLS:
    setattr(FailingDisk, _name, _failing(_name))


def state(step: int) -> Flat:
    """What is saved as a step."""
    return Flat(tensors(step), updates=step)


def save(root: Path, step: int, disk: Disk, *, background: bool) -> None:
    """One save, waited for."""
    config = CheckpointConfig(keep_last=2, async_save=background)
    with CheckpointStore(root, config, alone(), disk) as store:
        store.save(step, {"model": state(step)}, {"at": step})


def play(base: Path, root: Path, number: str, at: int, *, lasting: bool, background: bool) -> dict[str, Any]:
    """One fault in the save of step 30, in a folder with steps 10 and 20."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    disk = FailingDisk(getattr(errno, number), at, lasting=lasting)
    ended, wrong = "saved", []
    try:
        save(root, 30, disk, background=background)
    except StorageError as error:
        ended = "74"
        if "earlier checkpoints are intact" not in str(error):
            wrong.append(f"says {error}")
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {error}")
    for wanted in ((20, 30) if ended == "74" else (30,), (40,)):
        fresh = Flat(tensors(99))
        store = CheckpointStore(root, CheckpointConfig(), alone())
        found = store.resume({"model": fresh}, lambda checkpoint, into=fresh: into.load(checkpoint.source("model")))
        expected = state(found.step) if found is not None else fresh
        if found is None or found.step not in wanted:
            wrong.append(f"resumed {found and found.step}, not {wanted}")
        elif not all(torch.equal(value, expected.local[key]) for key, value in fresh.local.items()):
            wrong.append(f"step {found.step} is not what was saved")
        if wanted != (40,):
            save(root, 40, Disk(), background=background)
    if left := [path.name for path in root.iterdir() if path.name.endswith(".tmp")]:
        wrong.append(f"left {left}")
    keys = {"number": number, "call": at, "of": disk.hit, "lasting": lasting, "async": background}
    return keys | {"ended": ended, "wrong": wrong}


def main(out: Path) -> None:
    """Play all and write."""
    logging.disable(logging.CRITICAL)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        base, root, rows = Path(name, "base"), Path(name, "root"), []
        for step in (10, 20):
            save(base, step, Disk(), background=False)
        shutil.copytree(base, root)
        disk = FailingDisk()
        save(root, 30, disk, background=False)
        for number, lasting, background in itertools.product(NUMBERS, (False, True), (False, True)):
            rows += [play(base, root, number, at, lasting=lasting, background=background) for at in range(disk.count)]
    rows = [row for row in rows if row["of"]]  # the rest met nothing: a descriptor is closed whatever happens
    wrong = [row for row in rows if row["wrong"]]
    ends = Counter(row["ended"] for row in rows)
    report = {"faults": len(rows), "calls_of_a_save": disk.count, "wrong": len(wrong), "ended": dict(ends)}
    kinds = Counter((row["number"], row["of"], row["ended"]) for row in rows)
    table = [{"number": n, "of": of, "ended": e, "faults": k} for (n, of, e), k in sorted(kinds.items())]
    out.write_text(json.dumps(report | {"kinds": table, "wrong_rows": wrong}, indent=1) + "\n")
    print(report, wrong[:3])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
