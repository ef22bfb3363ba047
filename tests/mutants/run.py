"""Breaks the code on purpose, one place at a time, and reports what no test notices.

    python tests/mutants/run.py [--skip-baseline] [id or layer ...]

Every mutant of `mutants.toml` is applied to a copy of the tree and the tests that it names run there: it survives when
they all pass. Without arguments all are run. Exit code 1 when one survived or could not be judged.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutants.toml")
LIMIT_S = 300
KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "BROKEN"


@dataclass(frozen=True)
class Mutant:
    """One change that a test must notice."""

    id: str
    """Names the layer, a slash, and what is broken."""
    file: str
    """Relative to the repository."""
    old: str
    """Occurs exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Each of them passes on the code as it is; at least one fails on the mutant."""
    why: str
    """What goes wrong for a user."""


def mutants() -> list[Mutant]:
    """The committed list."""
    return [Mutant(**entry | {"tests": tuple(entry["tests"])}) for entry in tomllib.loads(LIST.read_text())["mutant"]]


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of all files that git knows or would add, removed at the end."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in filter(None, names):
            if (ROOT / name).is_file():
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        yield Path(folder)


@contextmanager
def applied(mutant: Mutant, tree: Path) -> Iterator[None]:
    """Inside, the tree is the mutant's."""
    path = tree / mutant.file
    source, stat = path.read_text(), path.stat()
    assert source.count(mutant.old) == 1, f"{mutant.id}: {mutant.file} holds {mutant.old!r} {source.count(mutant.old)}x"
    path.write_text(source.replace(mutant.old, mutant.new))
    # Python takes byte code for current by the seconds of the source: no two mutants may share one.
    applied.second += 1
    os.utime(path, (applied.second, applied.second))
    try:
        yield
    finally:
        path.write_text(source)
        os.utime(path, (stat.st_atime, stat.st_mtime))


applied.second = 1_000_000_000


def judged(tests: Collection[str], tree: Path) -> tuple[str, str]:
    """Whether tests fail in a tree, and the first that does. In a fork, so that torch is imported once for all."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setsid()
        _run_tests(tests, tree, writer)
    os.close(writer)
    deadline = time.monotonic() + LIMIT_S
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    if done == (0, 0):
        os.killpg(child, signal.SIGKILL)
        done = os.waitpid(child, 0)
        return KILLED, f"no end within {LIMIT_S} s"
    with os.fdopen(reader) as pipe:
        failed = pipe.read()
    code = os.waitstatus_to_exitcode(done[1])
    return {0: SURVIVED, 1: KILLED}.get(code, BROKEN), failed if code in (0, 1) else f"pytest ended with {code}"


def _run_tests(tests: Collection[str], tree: Path, writer: int) -> None:
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, tree))]
    sys.modules.pop("__main__", None)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    import pytest

    class First:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                os.write(writer, f"{report.nodeid}\n".encode())

    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests], plugins=[First()])
    os._exit(int(code))


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Apply mutants and report those that no test notices.")
    parser.add_argument("which", nargs="*", metavar="ID", help="ids, or layers such as `engine`; all by default")
    parser.add_argument("--skip-baseline", action="store_true", help="do not run the tests on the code as it is first")
    options = parser.parse_args()
    chosen = [m for m in mutants() if not options.which or {m.id, m.id.partition("/")[0]} & set(options.which)]
    if not chosen:
        parser.error(f"no mutant is called {' '.join(options.which)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import numpy  # noqa: F401 - before the forks
    import torch

    torch.set_num_threads(1)
    bad = 0
    with copied_tree() as tree:
        if not options.skip_baseline:
            found, first = judged({test for mutant in chosen for test in mutant.tests}, tree)
            if found != SURVIVED:
                print(f"the code as it is does not pass: {first}")
                return 1
        for mutant in chosen:
            began = time.monotonic()
            with applied(mutant, tree):
                found, first = judged(mutant.tests, tree)
            bad += found != KILLED
            print(f"{found:8} {mutant.id:48} {time.monotonic() - began:5.1f} s  {first.strip()}", flush=True)
    print(f"{len(chosen)} mutants, {bad} of them survived or could not be judged")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
