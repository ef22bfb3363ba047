"""Which tokenizer made these ids: one hash over everything that decides them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors; their order in the mapping does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(version: str, identity: Mapping[str, Any], content: str) -> str:
    """sha256 of code version, the settings that decide ids, and a hash of weights or tables.

    Args:
        version: Name and revision of the adapter; raised when its arithmetic changes the ids.
        identity: JSON-ready settings that decide ids (preprocessing, sizes, precision), and no others: a setting that
            is added later and decides nothing must not orphan existing token shards.
        content: Hash of the weights or of the vocabulary.
    """
    text = json.dumps([version, dict(identity), content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
