"""From an `OptimizerConfig` to a torch optimizer over named groups, and its options and state as plain values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokscale.base.log import logger
from tokscale.engine.fragments import Fragment, Master
from tokscale.engine.groups import ParameterGroup
from tokscale.engine.optimizer import AnyOptimizerConfig, ShardedOptimizer, optimizer_of

log = logger("engine")


def build_optimizer(config: AnyOptimizerConfig, groups: list[ParameterGroup]) -> ShardedOptimizer:
    """The optimizer over `groups`, each entry of `param_groups` carrying its `name`.

    The same class and arithmetic serve every engine: on whole parameters in eager, on flat shards under ZeRO.
    """
    entries = [
        {
            "params": list(group.parameters.values()),
            "name": group.name,
            "weight_decay": config.weight_decay if group.decays else 0.0,
            **({} if group.lr_scale == 1 else {"lr_scale": group.lr_scale}),
        }
        for group in groups
    ]
    make: Any = optimizer_of(config)
    return make(entries, config)


def fragments_of(
    optimizer: ShardedOptimizer, masters: list[Master], names: Mapping[nn.Parameter, str]
) -> list[Fragment]:
    """This rank's part of every parameter with its moments, parameters that are wholly elsewhere left out."""
    return [
        Fragment(
            names[piece.parameter],
            piece.shape,
            piece.start,
            master.data.detach().view(-1)[piece.place],
            optimizer.parts(piece),
        )
        for master in masters
        for piece in master.slices
        if piece.count
    ]


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the update counter that bias corrections read."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def hyper_parameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """JSON-ready options of each group: name, lr, weight decay, betas, ..."""
    return [
        {key: list(value) if isinstance(value, tuple) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def restore_hyper_parameters(
    optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]], *, keep: bool = False
) -> None:
    """Set each group's options to those saved under its name; a group that was not saved keeps its own.

    Args:
        optimizer: Whose groups are set.
        saved: As `hyper_parameters` gave them.
        keep: The group's own options stay where the two differ: they were changed on the record.
    """
    by_name = {options["name"]: options for options in saved}
    for group in optimizer.param_groups:
        for key, value in by_name.get(group["name"], {}).items():
            value = tuple(value) if isinstance(value, list) else value
            if key != "lr" and group.get(key, value) != value:  # the schedule sets lr at every step
                if keep:
                    log.warning("%s: %s=%s replaces %s of the checkpoint", group["name"], key, group[key], value)
                    continue
                log.warning("%s: %s=%s from the checkpoint replaces %s", group["name"], key, value, group[key])
            group[key] = value
