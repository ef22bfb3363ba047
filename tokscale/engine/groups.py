"""Named, ordered parameter groups: which weights decay, in the order of `named_parameters`.

Order and names are part of the checkpoint format. Deriving them from a set, as both seeds did, gives each process an
order of its own and maps optimizer state to the wrong weights on resume.
"""

from dataclasses import dataclass

import torch
from torch import nn

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
    """`decay` or `no_decay`."""
    parameters: dict[str, nn.Parameter]
    """By name, in the order of `named_parameters`."""


def parameter_groups(model: nn.Module) -> list[ParameterGroup]:
    """Divide a model's trainable parameters into `decay` and `no_decay`; empty groups are left out.

    No decay for parameters with fewer than two axes, and for those of norms and embeddings: torch's classes, classes
    whose name says so, and modules with a true attribute `no_decay`. A tied weight has one name, its first, and does
    not decay if any of its owners is an embedding.
    """
    no_decay = {id(parameter) for module in model.modules() if _no_decay(module) for parameter in own(module)}
    groups = [ParameterGroup("decay", {}), ParameterGroup("no_decay", {})]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = id(parameter) in no_decay or len(whole_shape(parameter)) < 2
            groups[plain].parameters[name] = parameter
    return [group for group in groups if group.parameters]


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
