"""Both of our sides of `bench rq` do what they say; the original's time is the sum over all its turns."""

from types import SimpleNamespace

import pytest

from tokscale.bench import rq
from tokscale.bench.measure import matrix_share

TINY = {
    "dim": 16,
    "spatial_layers": 1,
    "depth_layers": 1,
    "max_spatial_seq_len": 4,
    "depth_seq_len": 2,
    "num_tokens": 7,
    "batch": 2,
}


def test_a_step_is_the_same_each_time_and_an_image_has_all_its_codes():
    step, generate = rq.step(**TINY), rq.generate(**TINY)
    assert step() == step() > 0
    assert 0 <= generate() < 7
    assert 0 < matrix_share(step) < 1


def test_the_original_is_charged_for_every_turn_of_its_loop(monkeypatch):
    monkeypatch.setattr(rq, "original", lambda program, **options: (program, options))
    asked = []

    def measure(sides, **_):
        ((name, case),) = sides.items()
        if name == "ours":
            return {name: SimpleNamespace(seconds=0.5)}
        asked.append(case[1]["known"])
        return {name: SimpleNamespace(seconds=1.0 + case[1]["known"])}

    found = rq.generation(SimpleNamespace(measure=measure), "tiny", TINY)  # type: ignore[arg-type]
    assert asked == [1, 3, 5, 7]
    assert found["baseline"] == pytest.approx(8 + 4 * 8)  # eight turns, of four codes known on average
    assert found["ratio"] == pytest.approx(80) and found["target"] == 10
