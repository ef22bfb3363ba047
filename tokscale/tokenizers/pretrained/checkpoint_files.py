"""Tensors out of other people's checkpoint files, without running anything that is written in them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokscale.base.errors import CheckpointError

_WRAPPERS = ("state_dict", "model", "module")


class Inert:
    """Stands for any class a checkpoint names: it takes every argument and does nothing."""

    def __new__(cls, *arguments: Any, **options: Any) -> "Inert":
        """Swallow what the original constructor would have been given."""
        del arguments, options
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes of the pickled object as plain data."""
        self.state = state


def read_pickle(path: Path | str) -> Any:
    """What `torch.save` wrote, with `Inert` in the place of every object that is not plain data or a tensor.

    Raises:
        CheckpointError: When the file is missing, unreadable, or insists on a blocked function.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; download it first, nothing is fetched at run time")
    return _load_inertly(path)


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.pkl` file by their dotted names.

    Looks into the wrappers of common trainers (`state_dict`, `model`, `module`) and into pickled modules, whose
    classes need not exist here. Pickles are read by PyTorch's weights-only unpickler, which can call nothing but
    tensor constructors; every other class or function that a file names is replaced by `Inert`.

    Raises:
        CheckpointError: When the file is missing, unreadable, holds no tensors, or insists on a blocked function.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); download it again") from error
    tensors = named_tensors(_unwrapped(read_pickle(path)))
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors under a name; is it the checkpoint of a model?")
    return tensors


def named_tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a state dict, or of a pickled module, by dotted name."""
    if isinstance(value, Inert):
        value = _module_tree(value.state)
    found: dict[str, Tensor] = {}
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if isinstance(entry, Tensor):
                found[f"{prefix}{name}"] = entry.detach()
            elif isinstance(name, str):
                found |= named_tensors(entry, f"{prefix}{name}.")
    return found


def _load_inertly(path: Path) -> Any:
    unknown: list[str] = []
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # Pairs of a class and the name it stands for are accepted since torch 2.6; the annotation lags behind.
        placeholders: list[Any] = [(Inert, name) for name in unknown]
        with torch.serialization.safe_globals(placeholders):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can have its reader raise anything
        raise CheckpointError(
            f"{path}: cannot be read without running code from it ({_reason(error, unknown)}); if you trust it, load "
            "it where it was made and save its state_dict() as .safetensors"
        ) from error


def _reason(error: Exception, unknown: Sequence[str]) -> str:
    """Why a file was refused; never torch's own advice, which is to run the file's code."""
    if unknown:
        return f"it wants {', '.join(sorted(unknown)[:5])} to be called"[:300]
    sentences = re.split(r"(?<=\.)\s|\n", str(error).rpartition("WeightsUnpickler error:")[2])
    kept = [text.strip() for text in sentences if text.strip() and not re.search(r"weights_only|torch\.load", text)]
    if not kept or "Expected input to be a checkpoint" in kept[0]:
        return "it is no file that torch.save wrote"
    return kept[0][:300]


def _unwrapped(value: Any) -> Any:
    while isinstance(value, Mapping):
        inner = next((value[name] for name in _WRAPPERS if isinstance(value.get(name), Mapping | Inert)), None)
        if inner is None:
            return value
        value = inner
    return value


def _module_tree(state: Any) -> dict[str, Any]:
    """Parameters, buffers and children of a pickled `nn.Module`, from its attributes."""
    attributes = state if isinstance(state, Mapping) else {}
    tree: dict[str, Any] = {}
    for kind in ("_parameters", "_buffers", "_modules"):
        tree |= dict(attributes.get(kind) or {})
    return tree
