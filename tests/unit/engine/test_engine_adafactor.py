"""Adafactor against its formula on whole matrices, and the cutting of ranges into rectangles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokscale.base import rng
from tokscale.engine.adafactor import Adafactor, blocks
from tokscale.engine.config import AdafactorConfig
from tokscale.engine.fragments import whole_master
from tokscale.engine.optim import set_updates


@settings(deadline=None)
@given(rows=st.integers(1, 7), width=st.integers(1, 7), data=st.data())
def test_blocks_cover_each_element_of_a_range_at_its_place(rows, width, data):
    start = data.draw(st.integers(0, rows * width))
    count = data.draw(st.integers(0, rows * width - start))
    values = torch.arange(start, start + count)
    matrix = torch.full((rows, width), -1)
    cut = list(blocks(start, count, width))
    for block in cut:
        matrix[block.rows, block.columns] = block.of(values)
    expected = torch.arange(rows * width)
    expected[:start] = -1
    expected[start + count :] = -1
    assert torch.equal(matrix, expected.view(rows, width))
    assert len(cut) <= 3


def reference(weight, gradients, *, lr, decay, beta1, beta2, threshold, factored):
    """One parameter's trajectory, written as in the paper."""
    weight, moment = weight.clone(), torch.zeros_like(weight)
    second = torch.zeros_like(weight)
    row, column = torch.zeros(weight.shape[0]), torch.zeros(weight[0].numel())
    for step, gradient in enumerate(gradients, 1):
        rho = beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)
        squares = gradient.square() + 1e-30
        if factored:
            flat = squares.flatten(1)
            row, column = rho * row + (1 - rho) * flat.mean(1), rho * column + (1 - rho) * flat.mean(0)
            second = (torch.outer(row, column) / row.mean()).view_as(weight)
        else:
            second = rho * second + (1 - rho) * squares
        update = gradient / second.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item() / threshold)
        moment = beta1 * moment + (1 - beta1) * update
        weight = weight - lr * decay * weight - lr * moment
    return weight


# Updates that are cut to a size look the same whatever they were divided by: bias correction shows where none is cut.
@pytest.mark.parametrize("threshold", [0.7, 1e9])
def test_equals_the_formula_for_matrices_kernels_and_vectors(threshold):
    shapes = {"matrix": (8, 12), "kernel": (8, 3, 2, 2), "narrow": (3, 40), "vector": (9,)}
    draw = rng.generator(0, "adafactor")
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    config = AdafactorConfig(lr=0.1, clip_threshold=threshold, min_factor=8)
    optimizer = Adafactor([{"params": list(parameters.values()), "weight_decay": 0.2}], config)
    optimizer.start([whole_master(parameter) for parameter in parameters.values()], None)
    gradients = {name: [torch.randn(shape, generator=draw) for _ in range(4)] for name, shape in shapes.items()}
    for step in range(4):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
    for name, parameter in parameters.items():
        expected = reference(
            start[name],
            gradients[name],
            lr=0.1,
            decay=0.2,
            beta1=0.9,
            beta2=0.96,
            threshold=threshold,
            factored=name in ("matrix", "kernel"),
        )
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    held = optimizer.replicated({parameter: name for name, parameter in parameters.items()})
    assert {state.name for state in held} == {"matrix", "kernel"}


def test_state_is_small_for_factored_parameters():
    parameter = torch.nn.Parameter(torch.zeros(200, 300))
    optimizer = Adafactor([{"params": [parameter]}], AdafactorConfig())
    master = whole_master(parameter)
    optimizer.start([master], None)
    held = optimizer.replicated({parameter: "matrix"})
    assert {state.slot: state.data.numel() for state in held} == {"exp_avg_sq_row": 200, "exp_avg_sq_col": 300}
    assert list(optimizer.parts(master.slices[0])) == ["exp_avg"]
    set_updates(optimizer, 7)
    assert optimizer.state[parameter]["step"].item() == 7
