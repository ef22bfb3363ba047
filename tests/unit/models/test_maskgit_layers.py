"""Layers of MaskGIT: fused attention against the explicit one, and what the null entry is for."""

import pytest
import torch
import torch.nn.functional as F
from maskgit_models import make, make_batch
from torch import nn

from tokscale.base import rng
from tokscale.models.maskgit import operations
from tokscale.models.maskgit.config import BlocksConfig
from tokscale.models.maskgit.layers import Attention, FeedForward, Memory, TransformerBlocks
from tokscale.models.maskgit.operations import AlignedLinear, unit
from tokscale.nn.conditioning import Context


def blocks(**options: object) -> TransformerBlocks:
    config = BlocksConfig.model_validate({"dim": 16, "depth": 2, "heads": 2, "dim_head": 8} | options)
    with rng.scope(0, "blocks"):
        made = TransformerBlocks(config)
        for parameter in made.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1, 0.2)
        return made


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Context]:
    stream = rng.generator(0, "inputs")
    x, states = torch.randn(3, 6, 16, generator=stream), torch.randn(3, 4, 16, generator=stream)
    mask = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])
    return x.to(dtype), Context(states.to(dtype), mask)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_fused_attention_is_the_explicit_one_with_its_gradients(scale):
    x, context = inputs(torch.float64)
    results = []
    for flash in (True, False):
        model = blocks(flash=flash, scale=scale).double()
        out = model(x, context)
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-9, atol=1e-9)


def test_dropout_of_probabilities_works_fused_and_explicitly():
    x, context = inputs()
    for flash in (True, False):
        model = blocks(flash=flash, dropout=0.5)
        assert not torch.equal(model(x, context), model(x, context))
        assert torch.equal(model.eval()(x, context), model(x, context))


def test_attention_is_the_formula_of_the_seed():
    x, context = inputs()
    with rng.scope(0, "attention"):
        layer = Attention(BlocksConfig(dim=16, depth=1, heads=2, dim_head=8, scale=5), cross_attend=True)
        layer.q_scale.data.uniform_(0.5, 2)
        layer.k_scale.data.uniform_(0.5, 2)
    q = layer.to_q(F.layer_norm(x, (16,), layer.norm.weight))
    k, v = layer.to_kv(context.states).chunk(2, dim=-1)
    wanted = torch.zeros(3, 6, 16)
    for row in range(3):
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            seen = context.mask[row]
            keys = torch.cat([layer.null_kv[0, head][None], k[row, seen, part]])
            values = torch.cat([layer.null_kv[1, head][None], v[row, seen, part]])
            cosines = (
                F.normalize(q[row, :, part], dim=-1) * layer.q_scale @ (F.normalize(keys, dim=-1) * layer.k_scale).T
            )
            wanted[row, :, part] = (5 * cosines).softmax(-1) @ values
    torch.testing.assert_close(layer(x, context), layer.to_out(wanted), rtol=1e-5, atol=1e-6)


def test_rows_without_a_memory_see_the_null_entry_alone():
    x, context = inputs()
    model = blocks()
    hidden = Context(context.states, torch.zeros_like(context.mask))
    memories = model.memories(Context(context.states[:2], context.mask[:2]))
    mixed = model(x, memories)
    torch.testing.assert_close(mixed[2], model(x, hidden)[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[:2], model(x, context)[:2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixed[2], model(x, context)[2], atol=1e-3), "the context mattered"


def test_memories_are_the_context_computed_once():
    x, context = inputs()
    model = blocks()
    memories = model.memories(context)
    assert all(isinstance(memory, Memory) for memory in memories)
    torch.testing.assert_close(model(x, memories), model(x, context), rtol=1e-6, atol=1e-6)


def test_remat_gives_the_same_gradients():
    x, context = inputs()
    grads = []
    for remat in ("none", "block"):
        model = blocks(remat=remat)
        model(x, context).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("remat", ["none", "block"])
def test_output_at_some_places_alone_is_that_of_all_with_its_gradients(remat):
    x, context = inputs(torch.float64)
    places = torch.tensor([[True, False, False, True, False, False], [False] * 6, [False] + [True] * 5])
    results = []
    for pick in (lambda model: model(x, context, places), lambda model: model(x, context)[places]):
        model = blocks(remat=remat).double()
        out = pick(model)
        (out * torch.arange(7.0)[:, None]).sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in model.parameters())])
    for some, all_of_them in zip(*results, strict=True):
        torch.testing.assert_close(some, all_of_them, rtol=1e-10, atol=1e-10)


def test_feed_forward_gates_the_second_half_by_the_first():
    with rng.scope(0, "ff"):
        ff = FeedForward(12, 3)
    x = torch.randn(2, 3, 12, generator=rng.generator(0, "x"))
    first, gate = ff.to_hidden(F.layer_norm(x, (12,), ff.norm.weight)).chunk(2, dim=-1)
    wanted = ff.to_out(F.layer_norm(gate * F.gelu(first), (24,), ff.hidden_norm.weight))
    assert ff.to_out.in_features == 24
    torch.testing.assert_close(ff(x), wanted)


@pytest.mark.parametrize("width", [10, 16])
def test_aligned_products_are_the_plain_ones_with_their_gradients(width):
    stream = rng.generator(0, "aligned")
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=stream)  # noqa: E731
    x, weight, weights = draw(2, 5, width), draw(width, width), draw(2, 5, width + 3)[..., :width]
    results = []
    for make_linear in (AlignedLinear, lambda *sizes: nn.Linear(*sizes, bias=False)):
        linear, given = make_linear(width, width).double(), x.clone().requires_grad_()
        linear.weight.data.copy_(weight)
        out = linear(given)
        (out * weights).sum().backward()
        results.append([out.detach(), given.grad, linear.weight.grad])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert results[0][0].stride(-2) == 16 and results[0][2].is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        assert AlignedLinear(width, width)(x.float()).dtype == torch.bfloat16
    assert AlignedLinear(width, width).to("meta")(x.float().to("meta")).shape == x.shape


def test_a_feed_forward_computes_no_product_again(monkeypatch):
    counted, product = [], operations._product
    monkeypatch.setattr(operations, "_product", lambda a, b: counted.append(1) or product(a, b))
    x = torch.randn(2, 3, 12, requires_grad=True)
    FeedForward(12, 3)(x).sum().backward()
    assert len(counted) == 2 * 3, "forward, and the gradients of input and weight, of two layers"


def test_unit_vectors_have_the_gradients_of_their_formula():
    x = torch.randn(2, 3, 12, dtype=torch.float64, generator=rng.generator(0, "x"), requires_grad=True)
    ours, formula = unit(x), F.normalize(x, dim=-1)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    found, wanted = (torch.autograd.grad((out * weights).sum(), x, retain_graph=True) for out in (ours, formula))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_cast_model_runs_since_its_norms_have_no_buffers():
    model, batch = make(self_cond=True, self_token_critic=True).to(torch.bfloat16), make_batch()
    assert not list(model.buffers())
    out = model(batch)
    out.total.backward()
    assert out.total.dtype == torch.float32
    torch.testing.assert_close(out.total, make(self_cond=True, self_token_critic=True)(batch).total, rtol=3e-2, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
