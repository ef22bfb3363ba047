import math

import pytest

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.tokenizers.annealing import Annealing, extremes, value_at


def test_exponential_annealing_is_a_closed_form_of_the_step():
    rate, start = 1e-3, 0.9
    annealing = Annealing(kind="exponential", start=start, end=0.5, steps=round(math.log(start / 0.5) / rate))
    for step in (0, 1, 100, 250, 500):
        assert annealing.at(step) == pytest.approx(start * math.exp(-rate * step), rel=1e-3)
    assert annealing.at(10**9) == 0.5


def test_shapes_meet_their_ends_and_their_middle():
    for kind, middle in (("linear", 0.5), ("cosine", 0.5)):
        annealing = Annealing(kind=kind, start=0.0, end=1.0, steps=100, delay=10)
        assert [annealing.at(step) for step in (0, 10, 110, 500)] == [0.0, 0.0, 1.0, 1.0]
        assert annealing.at(60) == pytest.approx(middle)
    cosine = Annealing(kind="cosine", start=1.0, end=0.0, steps=100)
    assert cosine.at(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    geometric = Annealing(kind="exponential", start=1.0, end=1 / 16, steps=4)
    assert [geometric.at(step) for step in range(5)] == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16])


def test_constants_pass_through():
    assert value_at(0.3, 7) == 0.3
    assert extremes(0.3) == (0.3, 0.3)
    assert extremes(Annealing(start=1.0, end=0.1, steps=5)) == (0.1, 1.0)


def test_exponential_from_zero_is_refused():
    with pytest.raises(ConfigError, match="both must be positive"):
        decode(Annealing, {"kind": "exponential", "start": 0, "end": 1, "steps": 5})
