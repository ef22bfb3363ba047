"""Named, ordered parameter groups: which weights decay, in the order of `named_parameters`.

Order and names are part of the checkpoint format. Deriving them from a set, as both seeds did, gives each process an
order of its own and maps optimizer state to the wrong weights on resume.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tokscale.base.errors import ConfigError

NORMS_AND_EMBEDDINGS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters that share hyper-parameters."""

    name: str
    """`decay` or `no_decay`, and behind a slash the pattern of a learning rate of its own."""
    parameters: dict[str, nn.Parameter]
    """By name, in the order of `named_parameters`."""
    lr_scale: float = 1.0
    """Of the learning rate."""

    @property
    def decays(self) -> bool:
        """Whether its weights decay."""
        return base_of(self.name) == "decay"


def base_of(group: str) -> str:
    """`decay` or `no_decay`, of a group's name."""
    return group.partition("/")[0]


def parameter_groups(model: nn.Module, lr_scales: Mapping[str, float] | None = None) -> list[ParameterGroup]:
    """Divide a model's trainable parameters into `decay` and `no_decay`; empty groups are left out.

    No decay for parameters with fewer than two axes, and for those of norms and embeddings: torch's classes, classes
    whose name says so, and modules with a true attribute `no_decay`. A tied weight has one name, its first, and does
    not decay if any of its owners is an embedding.

    Args:
        model: Whose.
        lr_scales: By pattern of parameter names, a factor of the learning rate; the last that matches counts. Such
            parameters are in groups of their own, after the others.

    Raises:
        ConfigError: When a pattern matches no trainable parameter.
    """
    scales = lr_scales or {}
    no_decay = {id(parameter) for module in model.modules() if _no_decay(module) for parameter in own(module)}
    bases = ("decay", "no_decay")
    groups = {base: ParameterGroup(base, {}) for base in bases}
    for pattern, scale in scales.items():
        groups |= {f"{base}/{pattern}": ParameterGroup(f"{base}/{pattern}", {}, scale) for base in bases}
    matched: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            base = bases[id(parameter) in no_decay or len(whole_shape(parameter)) < 2]
            found = [pattern for pattern in scales if fnmatch.fnmatchcase(name, pattern)]
            matched.update(found)
            groups[f"{base}/{found[-1]}" if found else base].parameters[name] = parameter
    if unused := [pattern for pattern in scales if pattern not in matched]:
        raise ConfigError(f"optim.lr_scales: {unused[0]!r} matches no parameter that is trained")
    return [group for group in groups.values() if group.parameters]


def freeze(model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """The model, with the parameters whose names match a pattern never trained.

    Raises:
        ConfigError: When a pattern matches none, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"freeze: {pattern!r} matches no parameter; they are called like {names[0]!r}")
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze: nothing is left to train")
    return model


def own(module: nn.Module) -> list[nn.Parameter]:
    """Parameters held by a module itself, not by its children."""
    return list(module.parameters(recurse=False))


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also where ZeRO-3 has left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state dict, by their first name."""
    hidden = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in hidden}


def _no_decay(module: nn.Module) -> bool:
    name = type(module).__name__
    by_name = name.endswith(("Norm", "Embedding", "Embeddings"))
    return isinstance(module, NORMS_AND_EMBEDDINGS) or by_name or bool(getattr(module, "no_decay", False))
