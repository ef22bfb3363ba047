"""Filters, guidance, noise."""

import pytest
import torch

from tokscale.nn.sampling import SampleStreams, guide, gumbel_sample, sample_ids, sample_noise, top_k, top_p


def test_top_k_keeps_the_largest_fraction():
    logits = torch.randn(3, 2, 10)
    kept = torch.isfinite(top_k(logits, 0.7))
    assert kept.sum(-1).eq(3).all()
    assert torch.where(kept, logits, torch.inf).amin(-1).ge(torch.where(kept, -torch.inf, logits).amax(-1)).all()


@pytest.mark.parametrize(("thres", "count"), [(0.0, 10), (0.9, 1), (1.0, 1)])
def test_top_k_keeps_at_least_one_and_at_most_all(thres, count):
    assert torch.isfinite(top_k(torch.randn(10), thres)).sum() == count


def test_the_fraction_is_of_the_ids_that_can_be_drawn():
    """It was of text and image ids together: more than there are image ids, so it filtered nothing."""
    assert torch.isfinite(top_k(torch.randn(1, 8192), 0.5)).sum() == 4096


def test_top_p_keeps_the_fewest_that_hold_the_mass():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    for mass, ids in ((0.4, {1}), (0.51, {1, 2}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3}), (0.0, {1})):
        assert set(torch.isfinite(top_p(logits, mass)).nonzero().flatten().tolist()) == ids
    assert torch.equal(top_p(logits, 0.6)[1:3], logits[1:3])


def test_the_nucleus_is_that_of_the_temperature_the_draw_is_made_at():
    logits = torch.tensor([[4.0, 2.0, 0.0, 0.0]]).expand(200, -1)
    streams = SampleStreams(range(200), [0])
    hot = sample_ids(logits, streams, 0, temperature=50.0, top_p_mass=0.9)
    assert set(hot.tolist()) == {0, 1, 2, 3}  # at temperature 1 the first two hold the mass
    cold = sample_ids(logits / 10, streams, 0, temperature=0.05, top_p_mass=0.9)
    assert set(cold.tolist()) == {0}
    assert torch.equal(
        sample_ids(logits, streams, 0, temperature=2.0, top_p_mass=1e-9), torch.zeros(200, dtype=torch.int64)
    )


def test_guidance():
    conditional, null = torch.randn(2, 5), torch.randn(2, 5)
    assert torch.allclose(guide(conditional, null, 1.0), conditional, atol=1e-6)
    assert torch.equal(guide(conditional, null, 0.0), null)
    assert torch.allclose(guide(conditional, null, 3.0), 3 * conditional - 2 * null, atol=1e-5)


def test_low_precision_logits_do_not_favour_low_ids():
    """Noise in the logits' own dtype gave a mean id of 260 in bfloat16, of 1800 in float16; it should be 4095.5."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.zeros(200, 8192, dtype=dtype)
        for ids in (gumbel_sample(logits, noise=sample_noise(range(200), 0, 8192)), gumbel_sample(logits)):
            assert abs(ids.float().mean() - 4095.5) < 4 * 8192 / 12**0.5 / 200**0.5


def test_low_precision_logits_are_tempered_in_float32():
    logits, noise = torch.randn(200, 64).bfloat16(), sample_noise(range(200), 0, 64)
    assert torch.equal(gumbel_sample(logits, 0.3, noise), gumbel_sample(logits.float(), 0.3, noise))


def test_temperature_zero_is_the_largest_logit():
    logits = torch.tensor([[0.0, 3.0, 2.999], [5.0, 1.0, -1.0]])
    assert gumbel_sample(logits, 0.0).tolist() == [1, 0]
    assert gumbel_sample(logits, 0.0, torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])).tolist() == [1, 0]


def test_ids_come_with_the_softmaxs_probabilities():
    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.1])
    noise = sample_noise(range(20000), "step", 4)
    found = gumbel_sample(2.0 * probabilities.log().expand(20000, 4), 2.0, noise).bincount() / 20000
    assert (found - probabilities).abs().max() < 0.015


def test_filtered_ids_are_never_drawn():
    ids = gumbel_sample(top_k(torch.randn(500, 16), 0.75), 5.0)
    assert ids.shape == (500,)
    logits = torch.full((500, 4), -torch.inf)
    logits[:, 2] = 0
    assert gumbel_sample(logits, 100.0, sample_noise(range(500), 0, 4)).eq(2).all()


def test_noise_belongs_to_the_seed_and_the_step_not_to_the_batch():
    alone, together = sample_noise([7], 3, 64), sample_noise([1, 7, 2], 3, 64)
    assert torch.equal(alone[0], together[1])
    assert torch.equal(sample_noise([7], 3, 16)[0], alone[0, :16])
    for other in (sample_noise([8], 3, 64), sample_noise([7], 4, 64)):
        assert not torch.equal(other, alone)


def test_noise_is_gumbel():
    noise = sample_noise(range(64), 0, 4096).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - torch.pi**2 / 6) < 0.02
    assert abs(torch.corrcoef(noise[:2])[0, 1]) < 0.06
