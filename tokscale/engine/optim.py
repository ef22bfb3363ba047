"""From an `OptimizerConfig` to a torch optimizer over named groups, and its options and state as plain values."""

from typing import Any

import torch
from torch import Tensor

from tokscale.engine.config import OptimizerConfig
from tokscale.engine.groups import ParameterGroup


def build_optimizer(config: OptimizerConfig, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """The optimizer over `groups`, each entry of `param_groups` carrying its `name`.

    The same class and arithmetic serve every engine: on whole parameters in eager, on flat shards under ZeRO.
    """
    entries = [
        {
            "params": list(group.parameters.values()),
            "name": group.name,
            "weight_decay": config.weight_decay if group.name == "decay" else 0.0,
        }
        for group in groups
    ]
    # One pass over memory instead of a dozen, on the CPU as well as on CUDA.
    return torch.optim.AdamW(entries, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def start_state(optimizer: torch.optim.Optimizer, masters: list[tuple[Tensor, dict[str, Any]]]) -> None:
    """Make the moments now, as the first step would, so that they can be saved and loaded.

    Args:
        optimizer: The optimizer.
        masters: The tensors it moves, each with its entry of `param_groups`; under ZeRO they are not listed there.
    """
    for master, _ in masters:
        optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's tensors that are shaped like the parameter, by the optimizer's names."""
    return {
        key: value
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step"
    }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the update counter that the bias correction reads."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def hyper_parameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """JSON-ready options of each group: name, lr, weight decay, betas, ..."""
    return [
        {key: list(value) if isinstance(value, tuple) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def restore_hyper_parameters(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Set each group's options to those saved under its name; a group that was not saved keeps its own."""
    by_name = {options["name"]: options for options in saved}
    for group in optimizer.param_groups:
        for key, value in by_name.get(group["name"], {}).items():
            group[key] = tuple(value) if isinstance(value, list) else value
