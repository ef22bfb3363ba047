"""Hashing beside the reading: a damaged byte is found without another pass over cold storage.

A rank reads the ranges that it needs; threads of its own, as many as it has processors, read the rank's share of the
files from end to end and compare their sha256 with what was written. Both find the same bytes in the page cache, and
the ranks share the files, so that each is hashed once whatever the layout.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tokscale.base.errors import CheckpointError
from tokscale.checkpoint.manifest import INDEX, STATE
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.verify import check_hashes
from tokscale.checkpoint.weights import WeightFolder, check_weights
from tokscale.dist.comm import Comm


class Audit:
    """A check of this rank's share in the background. Every rank makes one, over the same files."""

    def __init__(self, check: Callable[[], None], comm: Comm):
        """Start `check` at once; it raises what it finds. `comm`: the ranks that share the files."""
        self._check, self._comm = check, comm
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def problem(self) -> str | None:
        """Wait for all ranks; the first damage that one of them found. Collective, equal on all ranks."""
        self._thread.join()
        return self._comm.first(self._problem)

    def _run(self) -> None:
        try:
            self._check()
        except CheckpointError as error:
            self._problem = str(error)
        except Exception as error:  # of a thread nobody would hear of it
            self._problem = f"{type(error).__name__}: {error}"


def audit_checkpoint(checkpoint: Checkpoint, engines: Iterable[str] | None, comm: Comm) -> Audit:
    """Of the tensor files of some engines, or of all; the small files are always hashed."""
    wanted = None if engines is None else tuple(f"{engine}.rank_" for engine in engines)
    names = [name for name in sorted(checkpoint.manifest.files) if name not in (INDEX, STATE)]
    names = [name for name in names if wanted is None or name.startswith(wanted)]
    mine = names[comm.rank :: comm.world]
    processors = len(os.sched_getaffinity(0)) // max(comm.env.local_world, 1)
    return Audit(partial(_check_files, checkpoint, mine, max(processors, 1)), comm)


def _check_files(checkpoint: Checkpoint, names: Sequence[str], threads: int) -> None:
    # sha256 lets go of the interpreter; one file is one chain, so what can run side by side are files.
    with ThreadPoolExecutor(threads, "hashes") as pool:
        checks = [pool.submit(check_hashes, checkpoint.folder, checkpoint.manifest, [name]) for name in names]
        try:
            for check in checks:
                check.result()
        finally:
            pool.shutdown(cancel_futures=True)


def audit_export(stored: WeightFolder, names: Iterable[str], comm: Comm) -> Audit:
    """Of some tensors of an export, as far as it has hashes."""
    return Audit(partial(check_weights, stored, sorted(names)[comm.rank :: comm.world]), comm)
