"""Weights of a tokenizer on disk: one safetensors file that carries its own hash."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokscale.base.errors import CheckpointError
from tokscale.base.files import atomic_write
from tokscale.tokenizers.fingerprint import weights_sha256

WEIGHTS = "model.safetensors"


def write_weights(folder: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors`, whole or not at all.

    Raises:
        StorageError: When the file system refuses.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(Path(folder) / WEIGHTS) as file:
        file.write(save(plain, {"format": "pt", "sha256": weights_sha256(plain)}))


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """Tensors of `model.safetensors`, checked against the hash stored beside them if there is one.

    Raises:
        CheckpointError: When the file is missing, damaged or altered.
    """
    path = Path(folder) / WEIGHTS
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no regular file")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            expected = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the folder is incomplete, export the tokenizer again") from None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); export it again") from error
    if expected is not None and expected != weights_sha256(tensors):
        raise CheckpointError(f"{path}: the weights do not match their sha256 {expected[:12]}; the file was damaged")
    return tensors
