"""How much is masked when, and that it follows from positions alone."""

import math

import pytest
import torch
from maskgit_models import COUNT, make

from tokscale.models.maskgit.masking import masks, sample_training_draws
from tokscale.models.maskgit.schedule import expected_masked, masked_share, training_masked

SCHEDULES = ["cosine", "arccos", "linear", "pow"]
MEANS = {"cosine": 2 / math.pi, "arccos": 2 / math.pi, "linear": 0.5, "pow": 2 / 3}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_everything_is_masked_at_first_and_nothing_at_last(schedule):
    share = masked_share(torch.linspace(0, 1, 101), schedule, 2.0)
    assert share[0] == pytest.approx(1) and share[-1] == pytest.approx(0, abs=1e-6)
    assert (share.diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_masks_the_schedules_share(schedule):
    config = make(noise_schedule=schedule).config
    predicted, hidden = masks(config, sample_training_draws(config, torch.arange(2000), 64, training=True), 64)
    assert torch.equal(predicted, hidden)
    assert predicted.float().mean().item() == pytest.approx(MEANS[schedule], rel=0.02)
    assert expected_masked(1024, schedule, 2.0, 0.0) / 1024 == pytest.approx(MEANS[schedule], rel=1e-3)


def test_the_power_bends_the_schedule():
    assert masked_share(torch.tensor(0.5), "pow", 3.0) == 1 - 0.5**3
    assert make(noise_schedule="pow", schedule_power=3.0).config.schedule_power == 3.0


def test_at_least_the_minimum_and_at_least_one_is_masked():
    assert training_masked(torch.tensor([0.0, 0.4, 1.0]), 10, 0.0).tolist() == [1, 4, 10]
    assert training_masked(torch.tensor([0.0, 0.4, 1.0]), 10, 0.5).tolist() == [5, 5, 10]
    config = make(min_masking_rate=0.5).config
    predicted, _ = masks(config, sample_training_draws(config, torch.arange(200), 64, training=True), 64)
    assert predicted.sum(1).min() == 32


def test_masks_follow_from_positions_and_hit_every_place_alike():
    config = make().config
    whole, _ = masks(config, sample_training_draws(config, torch.arange(4000), COUNT, training=True), COUNT)
    part, _ = masks(config, sample_training_draws(config, torch.arange(700, 710), COUNT, training=True), COUNT)
    assert torch.equal(whole[700:710], part)
    share = whole.float().mean(0)
    assert (share - share.mean()).abs().max() < 0.04


def test_neighbouring_samples_are_spread_over_the_schedule():
    config = make().config
    times = sample_training_draws(config, torch.arange(123, 123 + 16), 2, training=True).times.sort().values
    assert 0 <= times[0] and times[-1] < 1
    assert times.diff().max() < 0.15, "chance alone would leave gaps of a fifth"


def test_no_mask_token_prob_leaves_a_share_of_the_codes_to_predict_visible():
    config = make(no_mask_token_prob=0.25).config
    predicted, hidden = masks(config, sample_training_draws(config, torch.arange(500), 64, training=True), 64)
    assert not (hidden & ~predicted).any()
    visible = (predicted & ~hidden).sum(1)
    assert torch.equal(visible, (predicted.sum(1) * 0.25).ceil().long())
