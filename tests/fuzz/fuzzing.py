"""What every fuzz test uses: hostile values, mutations of bytes and of JSON, and a bound on what a case may do."""

import json
import os
import resource
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tokscale import cli
from tokscale.base.errors import TokscaleError

SCALE = "TOKSCALE_FUZZ_SCALE"
"""Environment variable: how many times as many cases; `--long` sets it to 25."""
CODES = {0, 64, 65, 69, 74, 75, 76, 77, 78}
_SECONDS, _WAITS = 60, 400
"""Of this process's own time, and of the clock: a busy machine makes a case slow, and does not make it hang."""
_GROWTH = 1 << 20
"""Kilobytes that the process may grow by in one test, over all its cases."""
T = TypeVar("T")


class HungError(BaseException):
    """A case took longer than any may."""


def cases(count: int) -> Callable[[T], T]:
    """So many cases, the same ones each time; more and other ones with `--long`."""
    scale = int(os.environ.get(SCALE, "1"))
    return settings(
        max_examples=count * scale,
        derandomize=scale == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, nothing may compute for long, nor wait for what never comes."""

    def hung(*_: object) -> None:
        raise HungError

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, _SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, _WAITS))
    before = [signal.signal(number, hung) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Inside, all cases together may not make the process grow by a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _GROWTH


def run(capsys: Any, *words: str) -> int:
    """Run a command; the code, which is one of the documented ones and never 1, with a sentence and no traceback."""
    capsys.readouterr()
    with bounded():
        code = cli.main(words)
    said = capsys.readouterr()
    assert code in CODES, f"{code} from {words}: {said.err[-2000:]}"
    assert "Traceback" not in said.err and len(said.err) < 30_000
    assert code == 0 or said.err.strip(), f"{code} from {words} without a word"
    return code


def survives(action: Callable[[], object]) -> None:
    """Run something that may only fail as `base.errors` do."""
    with bounded():
        try:
            action()
        except TokscaleError as error:
            assert type(error).exit_code in CODES and str(error)


HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, -0.0, 0.5, 1e-320),
    *("", " ", "x", "a" * 300, "..", "/dev/full", "/proc/self/mem", "~", "\0", "\n", "\x1b[2J"),
    *(
        "数据",
        "\u202e",
        "???",
        "${run_dir}",
        "${",
        "${oc.env:HOME}",
        "null",
        "nan",
        "inf",
        "1e999",
        "2026_11",
        "[",
        "{",
    ),
    *([], {}, [[]], {"kind": "x"}, {"kind": None}, [None], [1, "a"], {"a": {"b": {"c": 1}}}, {"": 1}),
]
"""What no key was made for."""


TEXT = st.text(st.characters(exclude_characters="/~"), max_size=20)
"""Names of nothing outside the folder of a test."""


def hostile() -> st.SearchStrategy[Any]:
    return st.one_of(st.sampled_from(HOSTILE), TEXT, st.integers(), st.floats(), st.lists(st.integers(), max_size=3))


def mutated(data: bytes, draw: Callable[[Any], Any]) -> bytes:
    """The same bytes with a few of them changed, left out, put in twice or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 5)):
            case 0:
                data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + draw(st.binary(max_size=40)) + data[at:]
            case 3:
                data = data[:at] + data[at + draw(st.integers(1, 64)) :]
            case 4:
                data = data[:at] + data[: draw(st.integers(0, 600))] + data[at:]
            case 5:
                bit = 1 << draw(st.integers(0, 7))
                data = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :] if data else b"\0"
    return data


def mutated_json(data: bytes, draw: Callable[[Any], Any]) -> bytes:
    """The same document with values somewhere in it replaced, removed or moved."""
    document = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.integers(0, 3)):
            case 0 | 1:
                holder[key] = draw(hostile())
            case 2:
                del holder[key]
            case 3:
                holder[key] = [holder[key]] if draw(st.booleans()) else {"x": holder[key]}
    return json.dumps(document).encode()


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    keys: Sequence[Any] = list(document) if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from _places(document[key])


def change_file(path: Path, draw: Callable[[Any], Any]) -> None:
    """Damage one file, by its bytes or, where it is JSON, by its structure."""
    data, structure = path.read_bytes(), path.suffix == ".json" and draw(st.booleans())
    try:
        changed = mutated_json(data, draw) if structure else mutated(data, draw)
    except ValueError:  # its bytes were damaged before, in the same case
        changed = mutated(data, draw)
    path.write_bytes(changed)


def fresh(folder: Path) -> Path:
    """A new folder for one case; that of the case before is taken away, whatever it has left behind."""
    for old in folder.glob("case-*"):
        shutil.rmtree(old, ignore_errors=True)
    made = folder / f"case-{secrets.token_hex(6)}"
    made.mkdir()
    return made


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
