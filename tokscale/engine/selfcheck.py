"""Is the installed DeepSpeed's gradient reduction held back where a shared module has several backward passes?

`ParameterAccess.accumulating` rests on a private attribute. Were it ignored, reversible stacks with shared functions
would train on wrong gradients without a word, so an engine tries it out before it trains.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from tokscale.base.errors import EnvironmentRefused
from tokscale.base.protocols import ParameterAccess, current, using
from tokscale.engine.config import ZeroConfig
from tokscale.engine.ds_config import deepspeed_config
from tokscale.engine.shards.layout import Layout

SIZE = 3


@functools.cache
def check_accumulating(
    deepspeed: Any,
    stage: Literal[0, 1, 2, 3],
    access: ParameterAccess,
    make_layout: Callable[[Any], Layout],
    device: torch.device,
) -> None:
    """Train one step of a linear map used twice, with a backward pass for each use. Collective; once per stage.

    Raises:
        EnvironmentRefused: When the reduced gradient is not the sum over both uses.
    """
    model = _TwiceInBackward().to(device)
    expected = _plain_gradient_norm(model)
    # A bucket of one element is reduced between the uses, which is when stock DeepSpeed loses the first gradient.
    config = ZeroConfig(stage=stage, reduce_bucket_size=1, param_persistence_threshold=0)
    options = deepspeed_config(config, parameters=SIZE * SIZE, micro_batches=1, micro_batch_size=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)
    found = None
    try:
        with using(access):
            engine.backward(engine(_example(device)))
        squares = torch.stack([gradient.square().sum() for gradient in make_layout(engine).gradients()]).sum()
        torch_dist.all_reduce(squares)
        found = squares.sqrt().item()
    except Exception as error:  # whatever DeepSpeed trips over at the second reduction
        found = " ".join(str(error).split())
    finally:
        engine.destroy()
    if not isinstance(found, float) or abs(found - expected) > 1e-4 * expected:
        raise EnvironmentRefused(
            f"self-check: deepspeed {deepspeed.__version__} does not hold back gradients of shared modules at stage "
            f"{stage} (gradient norm {found}, should be {expected:.6f}); reinstall the pinned version, or use "
            "engine.kind=eager"
        )


class _TwiceInBackward(nn.Module):
    """`layer(layer(x))`, recomputed in the backward pass as a reversible stack does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(SIZE * SIZE).view(SIZE, SIZE) / 10)

    def forward(self, x: Tensor) -> Tensor:
        anchor = torch.empty(0, device=x.device, requires_grad=True)
        return _Recomputed.apply(x, anchor, self.layer).sum()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        middle = layer(x)
        ctx.save_for_backward(x, middle)
        return layer(middle)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        first, middle = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        for given, last in ((middle, False), (first, True)):
            with torch.enable_grad():
                result = ctx.layer(given)
            with current(ParameterAccess).accumulating(ctx.layer.parameters(), last=last):
                torch.autograd.backward(result, gradient)
            assert given.grad is not None
            gradient = given.grad
        return gradient, None, None


def _example(device: torch.device) -> Tensor:
    return torch.arange(1.0, SIZE + 1, device=device).view(1, SIZE)


def _plain_gradient_norm(model: _TwiceInBackward) -> float:
    weight = model.layer.weight
    (gradient,) = torch.autograd.grad((_example(weight.device) @ weight.T @ weight.T).sum(), weight)
    return gradient.norm().item()
