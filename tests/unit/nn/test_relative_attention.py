"""Chunked attention with a bias per 2-D offset, against every score at once."""

import pytest
import torch

from tokscale.base import rng
from tokscale.nn.attention import relative
from tokscale.nn.attention.relative import Places, bias_row, dense_relative_attention, relative_attention

HEADS, DIM_HEAD = 4, 8


def inputs(places: Places, length: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    stream = rng.generator(0, "inputs")
    shapes = [(2, HEADS, length, DIM_HEAD), *[(2, kv_heads, length + 1, DIM_HEAD)] * 2, (places.rows, HEADS)]
    return [torch.randn(shape, generator=stream, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("chunk", [1 << 20, 1], ids=["one chunk", "chunks of 16"])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize(("index", "length"), [("raster", 43), ("raster", 30), ("sequence", 42), ("raster", 1)])
def test_output_and_gradients_are_the_dense_oracles(index, length, kv_heads, chunk, monkeypatch):
    monkeypatch.setattr(relative, "CHUNK_SCORES", chunk)
    places = Places(6, 7, index)
    given = inputs(places, length, kv_heads)
    out, wanted = relative_attention(*given, places), dense_relative_attention(*given, places)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=rng.generator(0, "direction"))
    grads = torch.autograd.grad((out * direction).sum(), given)
    for grad, want in zip(grads, torch.autograd.grad((wanted * direction).sum(), given), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


def test_tied_keys_and_values_get_both_gradients():
    places = Places(3, 4)
    q, k, _, table = inputs(places, 13, 1)
    grads = [
        torch.autograd.grad(attend(q, k, k, table, places).square().sum(), (q, k, table))
        for attend in (relative_attention, dense_relative_attention)
    ]
    for grad, want in zip(*grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


def test_low_precision_gives_its_own_type_from_a_single_precision_softmax():
    places = Places(6, 7)
    given = inputs(places, 43, 1, torch.bfloat16)
    out = relative_attention(*given, places)
    exact = dense_relative_attention(*(tensor.detach().double() for tensor in given), places)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    out.float().square().mean().backward()
    assert all(tensor.grad.dtype == torch.bfloat16 and tensor.grad.isfinite().all() for tensor in given)


def test_codes_are_placed_by_raster_and_the_start_token_apart():
    places = Places(3, 4)
    offsets = places.offsets()
    assert offsets.shape == (13, 13)
    start = places.rows - 1
    assert (offsets[0] == start).all() and (offsets[:, 0] == start).all()
    assert (offsets[1:, 1:] != start).all()
    # The last code of the first row and the first of the second are three columns and one row apart, not neighbours.
    assert offsets[5, 4] != offsets[2, 1] and offsets[5, 1] == offsets[9, 5]
    for query in range(12):
        for key in range(12):
            down, right = query // 4 - key // 4, query % 4 - key % 4
            assert offsets[query + 1, key + 1] == (down + 2) * 7 + right + 3
    # The original's: the first code counts as the second place, so the row ends one code too early.
    assert torch.equal(Places(3, 4, "sequence").offsets(), offsets[1:, 1:])


def test_one_position_reads_its_row_of_the_bias():
    places = Places(3, 4)
    table = torch.randn(places.rows, HEADS)
    row = bias_row(table, places, 6)
    assert row.shape == (1, HEADS, 1, 8) and not row[..., 0].any()
    assert torch.equal(row[0, :, 0, 1:], table[places.offsets()[6, :7]].t())


def test_no_more_scores_are_held_than_allowed(monkeypatch):
    monkeypatch.setattr(relative, "CHUNK_SCORES", 1)
    held = []
    weights = relative._weights

    def watched(*arguments: object) -> torch.Tensor:
        made = weights(*arguments)
        held.append(tuple(made.shape[-2:]))
        return made

    monkeypatch.setattr(relative, "_weights", watched)
    places = Places(6, 7)
    relative_attention(*inputs(places, 43, 1), places)
    assert held == [(16, 17), (16, 33), (11, 44)]


def test_keys_of_another_type_than_the_queries_have_a_backward_pass_too():
    # A backward pass runs outside of autocast, which had hidden the difference until then.
    places = Places(3, 4)
    q, k, v, table = (tensor.detach() for tensor in inputs(places, 7, 1))
    leaves = [q.bfloat16(), k.float(), v.float(), table.float()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    relative_attention(*leaves, places).float().square().sum().backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dense_relative_attention(*exact, places).square().sum().backward()
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad.double() - wanted.grad).norm() < 0.02 * wanted.grad.norm()
