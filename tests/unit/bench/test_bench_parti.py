"""`bench parti` on sizes too small to mean anything: its rows and our sides, not its metrics."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from tokscale.base.config import decode
from tokscale.bench import parti
from tokscale.bench.comparison import Case, Measured
from tokscale.bench.measure import row
from tokscale.bench.parti import PartiBench

TINY = {"dim": 16, "depth": 1, "heads": 1, "codes": 20, "words": 3, "width": 8, "batch": 2}
SIDES: dict[str, Callable[..., Callable[[], Any]]] = {"step": parti.step, "sample": parti.sample}


class Pretended:
    """Runs our sides; the original takes a second more the longer what it reads is."""

    def __init__(self, device: str):
        assert device == "cpu"

    def __enter__(self) -> "Pretended":
        return self

    def __exit__(self, *_: object) -> None: ...

    def measure(self, sides: Mapping[str, Case], **_: object) -> dict[str, Measured]:
        (name,) = sides
        case = sides[name]
        if name == "ours":
            result = SIDES[case.program.rpartition(":")[2]](**case.options)()
            return {name: Measured(0.5, None, result.shape)}
        return {name: Measured(1.0 + case.options["at"], None, None)}

    def rows(self, case: str, mine: Case, *, time: float | None, **_: object) -> Iterator[dict[str, Any]]:
        assert SIDES["step"](**mine.options)() > 0
        yield row(f"{case}/vs-original/time", 1.0, 2.0, "ms", time)


def test_rows_and_what_the_originals_sampling_is_worked_out_to(monkeypatch):
    monkeypatch.setattr(parti, "Comparison", Pretended)
    monkeypatch.setattr(parti, "original", lambda program, **options: Case(program, options, ""))
    found = list(parti.rows(decode(PartiBench, TINY | {"grids": [3]})))
    assert [entry["name"] for entry in found] == [
        "parti/step/2x3x3/fp32/vs-original/time",
        "parti/sample/2x3x3/fp32/vs-original/time",
    ]
    # Nine rounds that take 1, 2, ..., 9 seconds.
    assert found[1]["baseline"] == pytest.approx(45) and found[1]["ratio"] == pytest.approx(90)


def test_goals_are_those_of_their_sizes():
    assert parti.STEP_TARGETS == {16: 1.3, 32: 2.0} and parti.SAMPLE_TARGETS == {16: 20.0, 32: 60.0}
