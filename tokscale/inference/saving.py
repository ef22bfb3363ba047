"""Writing a loaded export again, as `save_pretrained` asks."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from tokscale.base.config import Config, encode
from tokscale.checkpoint.export import ExportOptions, write_export
from tokscale.models.registry import build_model


def save_again(
    target: Path, *, config: Config, model: nn.Module, source: Path, beside: Iterable[str], max_shard_size: int
) -> None:
    """An export of `model` as it is now, with what else the export in `source` holds.

    Args:
        target: Receives the export.
        config: The model's.
        model: Whose weights are written, in their own types.
        source: From where it was loaded.
        beside: Names of files and folders there that are copied, where they exist.
        max_shard_size: Most bytes of a file.

    Raises:
        StorageError: When the file system refuses.
    """
    with torch.device("meta"):
        meta_model = build_model(config)
    extras = {name: source / name for name in beside if (source / name).exists()}
    write_export(
        target,
        meta_model=meta_model,
        model_config=encode(config),
        state_dict=model.state_dict(),
        options=ExportOptions(dtype="stored", max_shard_size=max_shard_size, extras=extras),
    )
