"""From an `OptimizerConfig` to a torch optimizer over named groups, and its options and state as plain values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokscale.base.log import logger
from tokscale.dist.comm import Comm
from tokscale.engine.adafactor import Adafactor
from tokscale.engine.config import AdafactorConfig, AdamWConfig, LionConfig, MuonConfig
from tokscale.engine.fragments import Fragment, Master, ParamSlice, StateTensor
from tokscale.engine.groups import ParameterGroup
from tokscale.engine.lion import Lion
from tokscale.engine.muon import Muon

log = logger("engine")


def build_optimizer(
    config: AdamWConfig | AdafactorConfig | LionConfig | MuonConfig, groups: list[ParameterGroup]
) -> torch.optim.Optimizer:
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
    match config:
        case AdamWConfig():
            # One pass over memory instead of a dozen, on the CPU as well as on CUDA.
            return torch.optim.AdamW(entries, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        case LionConfig():
            return Lion(entries, lr=config.lr, betas=config.betas)
        case AdafactorConfig():
            return Adafactor(entries, config)
        case MuonConfig():
            return Muon(entries, config)


def start_state(optimizer: torch.optim.Optimizer, masters: list[Master], comm: Comm, *, divided: bool) -> None:
    """Make the moments now, as the first step would, so that they can be saved and loaded.

    Args:
        optimizer: The optimizer.
        masters: The tensors it moves; under ZeRO they are not its `param_groups`' parameters at all times.
        comm: The job.
        divided: Whether masters are parts of parameters, so that an optimizer that reads whole ones must communicate.
    """
    if isinstance(optimizer, Adafactor | Muon):
        optimizer.start(masters, comm if divided else None)
        return
    keys = ("exp_avg",) if isinstance(optimizer, Lion) else ("exp_avg", "exp_avg_sq")
    for master in masters:
        state: dict[str, Tensor] = {key: torch.zeros_like(master.data) for key in keys}
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.data.device)
        optimizer.state[master.data] = state


def fragments_of(
    optimizer: torch.optim.Optimizer, masters: list[Master], names: Mapping[nn.Parameter, str]
) -> list[Fragment]:
    """This rank's part of every parameter with its moments, parameters that are wholly elsewhere left out."""
    return [
        Fragment(
            names[piece.parameter],
            piece.shape,
            piece.start,
            master.data.detach().view(-1)[piece.place],
            _moments(optimizer, master, piece),
        )
        for master in masters
        for piece in master.slices
        if piece.count
    ]


def held_factors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> list[StateTensor]:
    """Optimizer state that is not shaped like the parameter and lies whole on every rank."""
    if not isinstance(optimizer, Adafactor):
        return []
    return [
        StateTensor(names[parameter], slot, tuple(value.shape), 0, value, replicated=True)
        for parameter, factors in optimizer.factors.items()
        for slot, value in factors.items()
    ]


def _moments(optimizer: torch.optim.Optimizer, master: Master, piece: ParamSlice) -> dict[str, Tensor]:
    if isinstance(optimizer, Adafactor):
        return optimizer.moments(master, piece)
    return {
        key: value.view(-1)[piece.place]
        for key, value in optimizer.state[master.data].items()
        if isinstance(value, Tensor) and key != "step"
    }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the update counter that bias corrections read."""
    for state in optimizer.state.values():
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
            value = tuple(value) if isinstance(value, list) else value
            if key != "lr" and group.get(key, value) != value:  # the schedule sets lr at every step
                log.warning("%s: %s=%s from the checkpoint replaces %s", group["name"], key, value, group[key])
            group[key] = value
