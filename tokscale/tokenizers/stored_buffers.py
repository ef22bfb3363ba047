"""What a folder of the transformers library stores and the library leaves unread: what it computes, or refused.

Tables that follow from the configuration (`position_ids`, `inv_freq`) are computed anew when a model is opened,
whatever was stored of them. A model that was trained with others would be another function.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from tokscale.base.errors import CheckpointError


def refuse_unread(model: nn.Module, folder: Path, unexpected: Iterable[str]) -> None:
    """Refuse weights of which something that belongs to the model has not come in.

    Args:
        model: As the library has opened it.
        folder: Whose `*.safetensors` it has read.
        unexpected: Names of stored tensors that the library had no place for; those of other parts, such as the decoder
            of a T5 of which only the encoder is opened, are none of the model's.

    Raises:
        CheckpointError: Naming the file and the tensor.
    """
    own = dict(model.state_dict())
    parts = {name.partition(".")[0] for name in own}
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in own}
    if lost := sorted(name for name in unexpected if name.partition(".")[0] in parts and name not in computed):
        raise CheckpointError(
            f"{folder}: {type(model).__name__} has no place for {', '.join(lost[:5])}; it was trained with other "
            "options than config.json states. If the model does not need it, delete it from the weights"
        )
    stored: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stored |= dict.fromkeys(file.keys(), path)
    prefix = _prefix(stored, own)
    for name in (name for name in computed if prefix + name in stored):
        with safe_open(stored[prefix + name], "pt") as file:
            theirs, ours = file.get_tensor(prefix + name), computed[name]
        same = theirs.shape == ours.shape and torch.allclose(
            theirs.to(ours.dtype).double(), ours.cpu().double(), rtol=1e-6, atol=0
        )
        if not same:
            raise CheckpointError(
                f"{stored[prefix + name]}: {prefix}{name} has other values than {type(model).__name__} computes, and "
                "those would be taken; if the model was not trained with the stored ones, delete it from the file"
            )


def _prefix(stored: Iterable[str], own: Iterable[str]) -> str:
    """What the model's names have in front of them in the file: it may have been saved as a part of a larger one."""
    names = set(stored)
    first = next(iter(own))
    found = {name.removesuffix(first) for name in names if name.endswith(first)}
    return max(sorted(found), key=lambda prefix: sum(prefix + name in names for name in own), default="")
