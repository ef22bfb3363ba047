"""Muon against PyTorch's, whose orthogonalisation runs in bf16, and its other half against AdamW."""

import torch

from tokscale.base import rng
from tokscale.engine.config import MuonConfig
from tokscale.engine.fragments import whole_master
from tokscale.engine.muon import Muon, orthogonal


def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values():
    draw = rng.generator(0, "muon")
    for shape in ((6, 9), (9, 6)):
        matrix = torch.randn(shape, generator=draw)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        levelled = left.T @ orthogonal(matrix) @ right.T
        torch.testing.assert_close(levelled, levelled.diag().diag(), atol=1e-4, rtol=0)
        assert 0.5 < levelled.diag().min() and levelled.diag().max() < 1.3


def test_equals_torch_on_matrices_and_adamw_on_the_rest():
    draw = rng.generator(0, "muon", 1)
    values = {"matrix": torch.randn(8, 12, generator=draw), "vector": torch.randn(9, generator=draw)}
    ours = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    theirs = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    optimizer = Muon(
        [
            {"params": [ours["matrix"]], "name": "decay", "weight_decay": 0.2},
            {"params": [ours["vector"]], "name": "no_decay", "weight_decay": 0.0},
        ],
        MuonConfig(lr=0.05),
    )
    optimizer.start([whole_master(parameter) for parameter in ours.values()], None)
    oracles = [
        torch.optim.Muon([theirs["matrix"]], lr=0.05, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs["vector"]], lr=0.05, betas=(0.9, 0.96), weight_decay=0.0),
    ]
    for _ in range(3):
        for name, value in values.items():
            gradient = torch.randn(value.shape, generator=draw)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        for stepper in (optimizer, *oracles):
            stepper.step()
    torch.testing.assert_close(ours["vector"], theirs["vector"])
    moved = (theirs["matrix"] - values["matrix"]).norm()
    assert (ours["matrix"] - theirs["matrix"]).norm() < 0.02 * moved
