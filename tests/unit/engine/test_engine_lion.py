"""Lion against its formula."""

import torch

from tokscale.base import rng
from tokscale.engine.config import LionConfig
from tokscale.engine.fragments import whole_master
from tokscale.engine.lion import Lion


def test_equals_the_formula():
    draw = rng.generator(0, "lion")
    parameter = torch.nn.Parameter(torch.randn(5, 3, generator=draw))
    weight, moment = parameter.detach().clone(), torch.zeros(5, 3)
    optimizer = Lion([{"params": [parameter], "weight_decay": 0.3}], LionConfig(lr=0.02, betas=(0.9, 0.99)))
    optimizer.start([whole_master(parameter)], None)
    for _ in range(5):
        gradient = torch.randn(5, 3, generator=draw)
        parameter.grad = gradient.clone()
        optimizer.step()
        weight = weight * (1 - 0.02 * 0.3) - 0.02 * torch.sign(0.9 * moment + 0.1 * gradient)
        moment = 0.99 * moment + 0.01 * gradient
    torch.testing.assert_close(parameter.detach(), weight)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], moment)
