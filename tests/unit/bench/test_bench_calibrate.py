"""`bench calibrate`: rates of a run give that run back, and others in proportion. No clock is looked at."""

import pytest

from tokscale.base.config import decode
from tokscale.bench.calibrate import CalibrateBench, calibrated, predict, work_of

CONFIG = decode(CalibrateBench, {"sizes": [64, 128]})


def test_the_run_that_was_measured_is_given_back():
    rates = calibrated(CONFIG, {1: (0.5, 0.1), 2: (0.7, 0.05)})
    assert predict(CONFIG, rates[1], 1, 64).seconds == pytest.approx(0.5)
    two = predict(CONFIG, rates[2], 2, 64)
    assert two.seconds == pytest.approx(0.7) and two.optimizer == pytest.approx(0.05)
    assert two.exposed_gather + two.exposed_reduce == pytest.approx(0.7 - 0.05 - 0.4)


def test_another_size_takes_longer_by_its_operations_and_its_parameters():
    rates = calibrated(CONFIG, {1: (0.5, 0.1), 2: (0.7, 0.05)})
    small, large = work_of(64), work_of(128)
    one, two = predict(CONFIG, rates[1], 1, 128), predict(CONFIG, rates[2], 2, 128)
    assert one.compute == pytest.approx(0.4 * large.flops / small.flops)
    assert one.optimizer == pytest.approx(0.1 * large.parameters / small.parameters)
    assert two.exposed_gather == pytest.approx(2 / 3 * 0.25 * large.parameters / small.parameters)
