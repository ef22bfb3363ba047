"""Named streams: equal names draw equal numbers, other names other numbers, and nothing outside is disturbed."""

import torch

from tokscale.base.rng import generator, mix64, scope, seed_of, uniform_at, uniforms_at


def test_streams_are_pinned_for_ever():
    # A checkpoint resumed next year must see the same data order and the same drops.
    assert seed_of(0, "dropout", 3, 1) == 4196305221699007308
    assert mix64(torch.tensor([0])).item() & (2**64 - 1) == 0xE220A8397B1DCDAF  # splitmix64's first output for seed 0


def test_names_separate_streams():
    draw = lambda *names: torch.rand(4, generator=generator(0, *names)).tolist()  # noqa: E731
    assert draw("a", 1) == draw("a", 1)
    assert len({tuple(draw(*names)) for names in [("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a1",)]}) == 5


def test_scope_sets_and_restores_the_default_generator():
    before = torch.get_rng_state()
    with scope(0, "train", 5):
        first = torch.rand(3)
    with scope(0, "train", 5):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_uniform_at_depends_on_the_position_only():
    positions = torch.arange(20_000)
    whole = uniform_at(positions, 7, "condition-drop")
    assert torch.equal(whole[5000:5003], uniform_at(positions[5000:5003], 7, "condition-drop"))
    assert 0 <= whole.min() and whole.max() < 1
    # 20,000 uniform draws: the mean lies within 5 standard errors, every tenth is hit about equally often.
    assert abs(whole.mean() - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5
    assert torch.histc(whole, 10, 0, 1).sub(2000).abs().max() < 250
    assert abs(torch.corrcoef(torch.stack([whole, uniform_at(positions, 7, "caption")]))[0, 1]) < 0.03


def test_uniforms_at_are_many_independent_numbers_per_position():
    positions = torch.arange(2000)
    whole = uniforms_at(positions, 16, 7, "order")
    assert torch.equal(whole[50:53], uniforms_at(positions[50:53], 16, 7, "order"))
    assert torch.equal(whole[:, :4], uniforms_at(positions, 4, 7, "order"))
    assert 0 < whole.min() and whole.max() < 1 and whole.unique().numel() == whole.numel()
    assert torch.histc(whole, 10, 0, 1).sub(3200).abs().max() < 300
    assert torch.corrcoef(whole.T).fill_diagonal_(0).abs().max() < 0.12
