"""`bench calibrate`: rates of a run give that run back, and others by class of kernel. No clock is looked at."""

import pytest

from tokscale.base.config import decode
from tokscale.bench.calibrate import CalibrateBench, Timed, calibrated, predict, work_of

CONFIG = decode(CalibrateBench, {"sizes": [64, 128]})
NARROW, FIRST, OTHER = 32, 64, 128
PEAK, HOST, KEPT_SECONDS, MESSAGES, LINK, UPDATE, UPDATE_BANDWIDTH = 1e10, 0.05, 1e-8, 0.01, 1e9, 0.002, 3e9


def made(world: int, size: int) -> Timed:
    """A run whose seconds follow from stated rates, counted here once more."""
    work = work_of(size)
    computing = HOST + KEPT_SECONDS * work.kept + CONFIG.micro_batch_size * work.flops / PEAK
    waits = MESSAGES + 12 * work.parameters * (world - 1) / world / LINK if world > 1 else 0.0
    update = UPDATE + work.parameters / world * 28 / UPDATE_BANDWIDTH
    return Timed(computing + waits + update, update, PEAK)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("size", [FIRST, OTHER])
def test_a_run_and_one_of_another_size_follow_from_the_calibration(world, size, monkeypatch):
    monkeypatch.setattr("tokscale.bench.calibrate._cores", lambda: 2)
    measured = {(ranks, width): made(ranks, width) for ranks in (1, 2) for width in (NARROW, FIRST)}
    predicted, truth = predict(CONFIG, calibrated(CONFIG, measured)[world], world, size), made(world, size)
    assert predicted.seconds == pytest.approx(truth.step)
    assert predicted.optimizer == pytest.approx(truth.update)
    assert (predicted.exposed_gather + predicted.exposed_reduce > 0) == (world > 1)


def test_processes_that_share_a_core_compute_as_slowly_as_their_product(monkeypatch):
    monkeypatch.setattr("tokscale.bench.calibrate._cores", lambda: 1)
    measured = {(1, width): made(1, width) for width in (NARROW, FIRST)}
    for width in (NARROW, FIRST):
        alone, two = made(1, width), made(2, width)
        waits = two.step - two.update - (alone.step - alone.update)
        measured[2, width] = Timed(2 * (alone.step - alone.update) + waits + two.update, two.update, PEAK / 2)
    predicted, alone = predict(CONFIG, calibrated(CONFIG, measured)[2], 2, OTHER), made(1, OTHER)
    assert predicted.compute == pytest.approx(2 * (alone.step - alone.update))
