"""Side by side with an original: each side a process of its own, called in turn, round by round.

A bench writes both sides as functions that build a case from plain options and return the call to be measured:

    # tokscale/bench/dalle.py                       # tests/originals/dalle.py
    def step(dim: int, depth: int) -> Callable[[], object]:  def step(dim: int, depth: int) -> Callable[[], object]:
        model = build_model(DALLEConfig(...))                    from dalle_pytorch import DALLE  # the original class
        return lambda: model(batch).total.backward()             ...

    def rows(config: DalleBench) -> Iterator[dict[str, Any]]:
        with Comparison() as comparison:
            mine, theirs = ours(f"{__name__}:step", dim=512, depth=8), original("dalle.py:step", dim=512, depth=8)
            yield from comparison.rows("dalle/step/b4/fp32", mine, original=theirs, rounds=3, time=1.5, memory=2.0)

`Comparison.rows` makes rows `<case>/vs-original/time` and `/memory`; `Comparison.measure` gives seconds, peak bytes and
what the last call returned (a number, a list), for rows that are worked out from them, and for a check that both sides
did the same. Any number of sides may take part: `rows(case, mine, original=..., cached=...)`.

The clock is the process's CPU time on one thread, the best of the rounds after one that is not counted; on a GPU it is
time between synchronisations. Peak memory is how far a call raises the process above its level before it.

Originals run in the interpreter that `./launch/originals` builds. A program that makes reference outputs runs there,
too: `./launch/originals tests/assets/make_dalle_reference.py`. RQ-transformer is 0.1.9 there; whoever needs 0.1.8 puts
`f"{sys.prefix}/rq-transformer-0.1.8"` first on `sys.path` before the import.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokscale.base.errors import EnvironmentRefused
from tokscale.bench.measure import row

ROOT = Path(__file__).parents[2]
ORIGINALS = ROOT / "tests/originals"


@dataclass(frozen=True)
class Case:
    """What one side is to build."""

    program: str
    """`package.module:function` or `file.py:function`."""
    options: Mapping[str, Any]
    """The function's arguments; plain values."""
    python: str
    """Interpreter."""


@dataclass(frozen=True)
class Measured:
    """What one side took for one call."""

    seconds: float
    peak: float | None
    """Bytes; None where it was not asked for or the system does not say."""
    result: Any
    """What the last call returned, where JSON can say it."""


def ours(program: str, **options: Any) -> Case:
    """A case in this interpreter, `f"{__name__}:function"`."""
    return Case(program, options, sys.executable)


def original(program: str, **options: Any) -> Case:
    """A case in the interpreter of the originals; `dalle.py:function` is a file of `tests/originals/`.

    Raises:
        EnvironmentRefused: When that interpreter was not built.
    """
    return Case(f"{ORIGINALS / program}", options, originals_python())


def originals_python() -> str:
    """The interpreter that `./launch/originals` builds.

    Raises:
        EnvironmentRefused: When it was not.
    """
    folder = Path(os.environ.get("TOKSCALE_ORIGINALS") or ROOT / ".originals")
    if not (folder / "complete").is_file():
        raise EnvironmentRefused(
            f"{folder}: the original implementations are not there; build them with ./launch/originals in a checkout"
        )
    return str(folder / "bin/python")


class Comparison:
    """Measures cases in turn; a side's process lives until the end, so that starting it is no part of any case."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self._processes: dict[tuple[str, str], _Process] = {}

    def __enter__(self) -> "Comparison":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.close()

    def measure(
        self, sides: Mapping[str, Case], *, rounds: int = 3, memory: bool = True, warm: bool = True
    ) -> dict[str, Measured]:
        """Call every side in each round.

        Args:
            sides: Cases by the name of their side.
            rounds: How many; the best of each side counts.
            memory: Whether peak memory is measured as well, by one more call.
            warm: Whether a round that is not counted comes first. Without it a long call is made once only.
        """
        running = {name: self._process(name, case) for name, case in sides.items()}
        for name, case in sides.items():
            running[name].ask("make", program=case.program, options=dict(case.options), device=self.device)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(rounds + warm):
            for name, process in running.items():
                answer = process.ask("call", device=self.device)
                if number or not warm:
                    answers[name].append(answer)
        return {
            name: Measured(
                min(answer["seconds"] for answer in answers[name]),
                process.ask("peak", device=self.device)["bytes"] if memory else None,
                answers[name][-1]["result"],
            )
            for name, process in running.items()
        }

    def start(self, sides: Mapping[str, Case]) -> dict[str, Callable[[], Any]]:
        """Build every side for who calls them in an order of their own: each entry calls its side once."""
        calls: dict[str, Callable[[], Any]] = {}
        for name, case in sides.items():
            process = self._process(name, case)
            process.ask("make", program=case.program, options=dict(case.options), device=self.device)
            calls[name] = lambda process=process: process.ask("call", device=self.device)["result"]
        return calls

    def rows(
        self,
        case: str,
        mine: Case,
        *,
        rounds: int = 3,
        time: float | Mapping[str, float] | None = None,
        memory: float | None = None,
        measure_memory: bool = True,
        limit: bool = False,
        warm: bool = True,
        **baselines: Case,
    ) -> Iterator[dict[str, Any]]:
        """The rows of a case: `<case>/vs-<baseline>/time` in ms and, where it is measured, `/memory` in MB.

        `time` and `memory` are the targets, as ratios: one for all baselines, or of time one for each. With `limit`,
        the row `/limit` says which ratio of time ours would have on a CPU if it were its matrix products alone.
        """
        found = self.measure({"ours": mine, **baselines}, rounds=rounds, memory=measure_memory, warm=warm)
        own = found.pop("ours")
        limit = limit and self.device == "cpu"
        share = self._process("ours", mine).ask("share")["share"] if limit else None
        for name, other in found.items():
            target = time[name] if isinstance(time, Mapping) else time
            yield row(f"{case}/vs-{name}/time", own.seconds * 1e3, other.seconds * 1e3, "ms", target)
            if own.peak and other.peak:
                yield row(f"{case}/vs-{name}/memory", own.peak / 1e6, other.peak / 1e6, "MB", memory)
            if share is not None:
                yield row(f"{case}/vs-{name}/limit", own.seconds * share * 1e3, other.seconds * 1e3, "ms")

    def _process(self, name: str, case: Case) -> "_Process":
        key = (name, case.python)
        if key not in self._processes:
            self._processes[key] = _Process(case.python)
        return self._processes[key]


class _Process:
    """A side's process, as seen from here."""

    def __init__(self, python: str):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        path = [str(ROOT), *([] if python == sys.executable else [str(ORIGINALS / "stubs")])]
        self._process = subprocess.Popen(
            [python, "-m", "tokscale.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = (
            json.loads(line) if line else {"error": f"ended with code {self._process.wait()}\n{self._last_words()}"}
        )
        if "error" in answer:
            what = request.get("program", do)
            raise RuntimeError(f"{self._process.args[0]}: {what}: {answer['error']}")  # type: ignore[index]
        return answer

    def close(self) -> None:
        """End the process; it leaves as soon as it is asked nothing more."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._said.close()

    def _last_words(self) -> str:
        self._said.seek(0)
        return self._said.read()[-4000:]
