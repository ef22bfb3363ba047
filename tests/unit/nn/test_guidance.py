"""How strong guidance is at each place of the drawing."""

import math

import pytest

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.nn.guidance import GuidedSampling


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [3, 3, 3, 3, 3]),
        ({"cond_scale_schedule": "constant"}, [3, 3, 3, 3, 3]),
        ({"cond_scale_start": 0.0}, [0, 0.75, 1.5, 2.25, 3]),
        ({"cond_scale_schedule": "linear"}, [1, 1.5, 2, 2.5, 3]),
        ({"cond_scale_schedule": "linear", "cond_scale_start": 5.0}, [5, 4.5, 4, 3.5, 3]),
        ({"cond_scale_schedule": "cosine"}, [1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5), 3]),
        ({"cond_scale_schedule": "power"}, [1, 1.125, 1.5, 2.125, 3]),
        ({"cond_scale_schedule": "power", "cond_scale_power": 0.5}, [1, 2, 1 + math.sqrt(2), 1 + math.sqrt(3), 3]),
        ({"cond_scale_interval": (0.25, 0.5)}, [1, 3, 3, 1, 1]),
        ({"cond_scale_schedule": "linear", "cond_scale_interval": (0.4, 1.0)}, [1, 1, 2, 2.5, 3]),
    ],
)
def test_the_scale_follows_the_schedule(options, wanted):
    how = GuidedSampling(cond_scale=3.0, **options)
    assert [how.scale_at(place, 5) for place in range(5)] == pytest.approx(wanted)
    assert how.guided


def test_no_null_pass_where_nothing_is_guided():
    assert not GuidedSampling().guided and not GuidedSampling(cond_scale_schedule="linear").guided
    assert GuidedSampling(cond_scale_start=2.0).guided, "it ends at 1, and begins elsewhere"
    assert GuidedSampling(cond_scale=4.0).scale_at(0, 1) == 4.0


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"cond_scale_schedule": "constant", "cond_scale_start": 1.0}, "a constant scale has none"),
        ({"cond_scale_power": 2.0}, "is read by cond_scale_schedule=power alone"),
        ({"cond_scale_interval": [0.5, 0.2]}, "0 <= first <= last <= 1"),
        ({"cond_scale_interval": [0.5, 1.2]}, "0 <= first <= last <= 1"),
        ({"cond_scale_schedule": "linaer"}, "linear"),
    ],
)
def test_options_that_say_nothing_are_refused(options, answer):
    with pytest.raises(ConfigError, match=answer):
        decode(GuidedSampling, options)
