"""Which weights decay, and that names and order are those of the model."""

import os
import subprocess
import sys

from torch import nn

from tokscale.engine.config import AdamWConfig
from tokscale.engine.groups import parameter_groups, persistent_buffers
from tokscale.engine.optim import build_optimizer, hyper_parameters
from tokscale.engine.testing import ToyModel


def names(model: nn.Module) -> dict[str, list[str]]:
    return {group.name: list(group.parameters) for group in parameter_groups(model)}


def test_matrices_decay_and_norms_biases_embeddings_do_not():
    assert names(ToyModel(uses=(0,), blocks=1)) == {
        "decay": ["blocks.0.0.weight", "blocks.0.2.weight"],
        "no_decay": ["embed.weight", "norms.0.weight", "norms.0.bias", "blocks.0.0.bias", "blocks.0.2.bias"],
    }


def test_classes_named_or_marked_as_embeddings_do_not_decay():
    class AxialEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(nn.init.zeros_(nn.Linear(2, 3).weight.data))

    class Marked(AxialEmbedding):
        no_decay = True

    model = nn.ModuleDict({"a": AxialEmbedding(), "b": Marked(), "conv": nn.Conv2d(1, 2, 3, bias=False)})
    assert names(model) == {"decay": ["conv.weight"], "no_decay": ["a.rows", "b.rows"]}


def test_frozen_parameters_and_hidden_buffers_are_left_out():
    model = ToyModel()
    trained = [name for group in names(model).values() for name in group]
    assert not any(name.startswith("frozen") for name in trained)
    assert list(persistent_buffers(model)) == ["scale"]


def test_options_carry_the_group_names():
    options = hyper_parameters(build_optimizer(AdamWConfig(weight_decay=0.2), parameter_groups(ToyModel())))
    assert [(group["name"], group["weight_decay"], group["betas"]) for group in options] == [
        ("decay", 0.2, [0.9, 0.96]),
        ("no_decay", 0.0, [0.9, 0.96]),
    ]


def test_groups_do_not_depend_on_the_process():
    program = (
        "from tokscale.engine.groups import parameter_groups; from tokscale.engine.testing import ToyModel;"
        "print([list(g.parameters) for g in parameter_groups(ToyModel())])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
