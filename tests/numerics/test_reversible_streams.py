"""The reversible stack against the same blocks run plainly."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tokscale.base import rng
from tokscale.base.protocols import ParameterAccess, using
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout
from tokscale.nn.reversible import ResidualBranch, run_plain, run_reversible
from tokscale.nn.stack import Stack

LAYOUT = TokenLayout(5, 4, 4)
BASE = {"dim": 16, "depth": 4, "heads": 2, "dim_head": 8, "reversible": True}
SHARED = {"shared_attn_ids": (0, 1, 0, 1), "shared_ff_ids": (0, 0, 1, 1)}
MIXED = {"attn_types": ("full", "axial_row", "axial_col", "conv_like"), "kernel_size": 3}


def stack(**options) -> Stack:
    with rng.scope(0, "weights"):
        built = Stack(StackConfig(**BASE | options), LAYOUT)
        for name, parameter in built.named_parameters():
            if name.endswith("scale.scale"):  # as large as trained ones, so that no branch hides
                nn.init.normal_(parameter, 1.0, 0.3)
    return built


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(2, LAYOUT.seq, 16, generator=generator) for _ in range(2))
    return x.to(dtype), weight.to(dtype)


def gradients(model: Stack, run, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """By parameter name, and of the input as `x`."""
    x, weight = inputs(dtype)
    x.requires_grad_()
    model.zero_grad()
    with rng.scope(3, "dropout"):
        out = run(model, x)
    out.backward(weight)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {"x": x.grad.clone(), "out": out.detach()} | {name: grad.clone() for name, grad in found.items()}


def reversed_run(model: Stack, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def plain_run(model: Stack, x: torch.Tensor) -> torch.Tensor:
    from tokscale.nn.rotary import rotary_table

    return run_plain(x, model.branches(rotary_table(LAYOUT, 8), None))


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max((a - expected[k]).norm().item() / expected[k].norm().item() for k, a in found.items())


@pytest.mark.parametrize(
    "options",
    [{}, SHARED, MIXED, {"shift_tokens": True, "sandwich_norm": True}, SHARED | {"shift_tokens": True}],
    ids=["plain", "shared", "mixed", "shift+sandwich", "shared+shift"],
)
def test_gradients_are_those_of_the_plain_run(options):
    model = stack(**options)
    assert worst(gradients(model, reversed_run), gradients(model, plain_run)) < 2e-6


@pytest.mark.parametrize("options", [{}, SHARED], ids=["own", "shared"])
def test_dropout_is_replayed(options):
    model = stack(attn_dropout=0.2, ff_dropout=0.2, **options)
    assert worst(gradients(model, reversed_run), gradients(model, plain_run)) < 2e-6


def test_dropout_is_replayed_per_call_not_per_module():
    """A second forward pass before the first backward pass must not change what the first one replays."""
    model = stack(ff_dropout=0.2)

    def twice(model: Stack, x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        model(x)
        return out

    assert worst(gradients(model, twice), gradients(model, plain_run)) < 2e-6


def test_a_pass_leaves_the_random_stream_where_the_plain_one_leaves_it():
    model, (x, weight) = stack(ff_dropout=0.2), inputs()
    after = []
    for run in (reversed_run, plain_run):
        with rng.scope(0, "step"):
            run(model, x).backward(weight)
            after.append(torch.rand(3))
    assert torch.equal(*after)


def test_autocast_is_as_it_was_in_the_forward_pass():
    model = stack()

    def autocasting(run):
        def under(model: Stack, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(model, x)

        return under

    exact = gradients(model, plain_run)
    expected, found = (gradients(model, autocasting(run)) for run in (plain_run, reversed_run))
    noise = worst(expected, exact)
    assert noise > 1e-3  # bfloat16 was at work
    assert worst(found, expected) < noise


def test_gradients_arrive_when_backward_is_called_inside_autocast():
    model, (x, weight) = stack(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).backward(weight)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_input_without_gradient_trains_the_parameters():
    model, (x, weight) = stack(), inputs()
    out = model(x)
    assert out.requires_grad
    out.backward(weight)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    expected = gradients(model, plain_run)
    assert worst(found, {name: expected[name] for name in found}) < 2e-6


def test_without_gradients_nothing_is_kept():
    model, (x, _) = stack(), inputs()
    with torch.no_grad():
        out = model(x)
    assert not out.requires_grad
    assert torch.equal(out, model(x).detach())


def test_streams_of_low_precision_models_are_float32():
    model = stack().bfloat16()
    found, expected = (gradients(model, run, torch.bfloat16) for run in (reversed_run, plain_run))
    assert found["out"].dtype == torch.bfloat16
    assert worst(found, expected) < 2e-2
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        model(inputs(torch.bfloat16)[0])
    assert kept == [torch.float32] * 2


def test_memory_does_not_grow_with_depth():
    def saved(depth: int) -> int:
        model, (x, _) = stack(depth=depth), inputs()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(x)
        return sum(sizes)

    assert saved(2) == saved(8) > 0


class Recording(ParameterAccess):
    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], bool]] = []
        self.inside = False

    @contextmanager
    def accumulating(self, parameters, *, last):
        self.calls.append((tuple(id(parameter) for parameter in parameters), last))
        self.inside = True
        yield
        self.inside = False


def test_the_engine_is_told_of_each_use_of_a_shared_module_and_of_the_last():
    model, (x, weight) = stack(**SHARED), inputs()
    access = Recording()
    announced: list[bool] = []
    for module in (model.attentions, model.feedforwards):
        for parameter in module.parameters():
            parameter.register_hook(lambda grad: announced.append(access.inside))
    with using(access):
        model(x).backward(weight)
    assert announced and all(announced)
    for module in (*model.attentions, *model.feedforwards):
        ids = tuple(id(parameter) for parameter in module.parameters())
        flags = [last for called, last in access.calls if called == ids]
        assert flags == [False, True]


def test_unshared_modules_are_not_announced():
    model, (x, weight) = stack(), inputs()
    access = Recording()
    with using(access):
        model(x).backward(weight)
    assert not access.calls


def test_a_failing_recomputation_is_an_error():
    def fails(x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no")
        return x

    x = torch.randn(1, 2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no"):
        run_reversible(x, [ResidualBranch(fails)]).sum().backward()


@pytest.mark.parametrize("remat", ["block", "regions"])
@pytest.mark.parametrize("options", [{}, SHARED, MIXED | {"shift_tokens": True}], ids=["own", "shared", "mixed"])
def test_remat_gives_the_same_gradients_and_keeps_less(remat, options):
    options = {"reversible": False, "ff_dropout": 0.2, "attn_dropout": 0.1} | options
    kept, found = {}, {}
    for mode in ("none", remat):
        model = stack(remat=mode, **options)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            found[mode] = gradients(model, reversed_run)
        kept[mode] = sum(sizes)
    assert worst(found[remat], found["none"]) < 1e-6
    assert kept[remat] < kept["none"] / (8 if remat == "block" else 2)


def test_remat_recomputes_each_layer_with_its_own_function():
    """A closure over the loop variable would recompute every layer with the last one's weights, without an error."""
    models = [stack(reversible=False, remat=mode) for mode in ("none", "block")]
    first, second = (gradients(model, reversed_run) for model in models)
    assert worst(second, first) < 1e-6
    assert first["layers.0.attn.norm.weight"].norm() != first["layers.3.attn.norm.weight"].norm()
