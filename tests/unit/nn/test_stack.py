"""What a stack is made of."""

import copy

import pytest
import torch

from tokscale.base.errors import ConfigError
from tokscale.nn.attention.blocksparse import block_table
from tokscale.nn.attention.module import training_backends
from tokscale.nn.attention.sparsity import VariableLayout
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.stack import Stack

LAYOUT = TokenLayout(5, 4, 4)
SMALL = {"dim": 16, "depth": 4, "heads": 2, "dim_head": 8}


def stack(layout: TokenLayout = LAYOUT, causal: bool = True, **options) -> Stack:
    return Stack(StackConfig(**SMALL | options), layout, causal=causal)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_parameter_count_is_the_formula():
    attention, feedforward = 16 * 48 + 16 * 16 + 16, 16 * 128 + 128 + 64 * 16 + 16
    assert parameters(stack()) == 4 * (attention + feedforward + 2 * 3 * 16)


def test_a_plain_block_has_no_gate_and_no_scale():
    attention, feedforward = 16 * 48 + 16 * 16 + 16, 16 * 64 + 64 + 64 * 16 + 16
    model = stack(ff_glu=False, layer_scale=False)
    assert parameters(model) == 4 * (attention + feedforward + 2 * 2 * 16)
    first, x = model.layers[0], torch.randn(2, LAYOUT.seq, 16)
    wanted = model.feedforwards[0].to_out(torch.nn.functional.gelu(model.feedforwards[0].to_hidden(first.ff.norm(x))))
    assert torch.equal(first.ff.post(model.feedforwards[0](first.ff.pre(x))), wanted)


def test_shared_functions_are_registered_once():
    shared = stack(shared_attn_ids=("a", "b"), shared_ff_ids=(7,))
    assert (len(shared.attentions), len(shared.feedforwards), len(shared.layers)) == (2, 1, 4)
    names = [name for name, _ in shared.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(parameter) for parameter in shared.parameters()}) == len(shared.state_dict())


def test_norms_and_scales_stay_with_their_layers():
    shared = stack(shared_attn_ids=(0,), shared_ff_ids=(0,))
    assert sum("scale" in name for name in shared.state_dict()) == 8


def test_scales_start_smaller_in_deep_layers():
    deep = stack(dim=4, depth=26, shared_attn_ids=(0,), shared_ff_ids=(0,))
    starts = [layer.attn.scale.scale[0].item() for layer in deep.layers]
    assert starts == pytest.approx([0.1] * 18 + [1e-5] * 6 + [1e-6] * 2)


def test_a_shorter_sequence_is_the_head_of_a_longer_one():
    model = stack(attn_types=("full", "axial_row", "axial_col", "conv_like"), shift_tokens=True).eval()
    x = torch.randn(2, LAYOUT.seq, 16)
    whole = model(x)
    for length in (1, 4, 5, 6, 12, LAYOUT.seq - 1):
        assert torch.allclose(model(x[:, :length]), whole[:, :length], atol=1e-6)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ConfigError, match="22 positions does not fit the layout of 21 \\(5 text, 4x4 image\\)"):
        stack()(torch.randn(1, 22, 16))


def test_a_causal_stack_does_not_look_ahead():
    model = stack(
        attn_types=("full", "axial_col", "conv_like", "sparse"), shift_tokens=True, sparse=VariableLayout(block=4)
    )
    x = torch.randn(1, LAYOUT.seq, 16, requires_grad=True)
    for position in (0, 4, 5, 9, 20):
        (grad,) = torch.autograd.grad(model(x)[0, position].sum(), x)
        assert grad[0, position].any() and not grad[0, position + 1 :].any()


@pytest.mark.parametrize("layout", [TokenLayout(9), TokenLayout(0, 3, 3)], ids=["text", "image"])
def test_encoders_see_both_ways_and_skip_padding(layout: TokenLayout):
    model = stack(layout, causal=False, rotary_emb=False)
    x, key_mask = torch.randn(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    key_mask[:, 6:] = False
    changed = x.clone()
    changed[:, 7, 0] += 5  # one channel: a norm takes off what all have in common
    assert torch.equal(model(x, key_mask=key_mask)[:, :6], model(changed, key_mask=key_mask)[:, :6])
    assert not torch.allclose(model(x)[:, 0], model(changed)[:, 0])


def test_a_bidirectional_stack_refuses_what_has_one_direction_before_any_weight(monkeypatch):
    monkeypatch.setattr(torch.nn, "Linear", lambda *args, **kwargs: pytest.fail("a weight was made"))
    with pytest.raises(ConfigError, match="conv_window"):
        stack(causal=False, attn_types=("conv_like",))


def test_sparse_layers_train_and_decode():
    model = stack(attn_types=("sparse",), sparse=VariableLayout(block=4), shift_tokens=True)
    x = torch.randn(1, LAYOUT.seq, 16)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model(x, cache=model.new_cache(1, device="cpu", dtype=torch.float32)).shape == x.shape


def test_sparse_layers_differ_in_their_random_blocks():
    model = stack(attn_types=("sparse",), sparse=VariableLayout(block=2))
    first, second = (block_table(model.attentions[index].pattern, "cpu") for index in (0, 1))
    assert not torch.equal(first, second)


def test_batch_one_without_rotary_trains():
    model = stack(attn_types=("axial_row", "conv_like"), rotary_emb=False)
    model(torch.randn(1, LAYOUT.seq, 16)).sum().backward()


def test_a_stack_can_be_copied_and_built_on_the_meta_device():
    model = stack(attn_types=("full", "sparse"))
    x = torch.randn(1, LAYOUT.seq, 16)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    with torch.device("meta"):
        empty = stack(attn_types=("full", "sparse"))
    assert parameters(empty) == parameters(model)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize("gated", [True, False])
def test_forward_flops_are_the_matrix_products(gated):
    from torch.utils.flop_counter import FlopCounterMode

    model = stack(attn_backend="dense", ff_glu=gated)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, LAYOUT.seq, 16))
    dense_cells, causal_cells = LAYOUT.seq**2, LAYOUT.seq * (LAYOUT.seq + 1) // 2
    assert model.forward_flops() == counter.get_total_flops() - 4 * 4 * 16 * (dense_cells - causal_cells)


def test_backends_are_reported_by_kind():
    model = stack(TokenLayout(257, 32, 32), attn_types=("full", "axial_row"))
    assert model.backends("cpu", torch.float32) == {"full": "sdpa", "axial_row": "fast"}


def test_backends_of_a_model_are_told_by_kind():
    options = {"attn_types": ("full", "axial_row", "conv_like", "sparse"), "kernel_size": 3}
    cpu, layout = torch.device("cpu"), TokenLayout(16, 32, 32)
    told = training_backends(stack(layout, **options), cpu, torch.float32)
    assert told == {"full": ["sdpa"], "axial_row": ["fast"], "conv_like": ["fast"], "sparse": ["fast"]}
    assert training_backends(stack(layout, **options, attn_backend="dense"), cpu, torch.float32)["full"] == ["dense"]
    assert training_backends(torch.nn.Linear(2, 2), cpu, torch.float32) == {}
