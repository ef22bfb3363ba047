"""`save_pretrained` and `from_pretrained`, as huggingface_hub's mixin names them, on local folders and without it."""

import re
from pathlib import Path
from typing import Any, Self

from tokscale.base.errors import CheckpointError, ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class HubMixin:
    """Gives a class the two names that the users of model hubs know. Subclasses say how, in the two methods below."""

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str = "5GB") -> str:
        """Write an export folder.

        Args:
            save_directory: The folder; an export that is there is replaced.
            max_shard_size: Of one weights file, in bytes, or as `"5GB"`.

        Returns:
            The folder.

        Raises:
            ConfigError: When the folder holds something else, or the size cannot be read.
        """
        self._save_pretrained(Path(save_directory), max_shard_size=parse_size(max_shard_size))
        return str(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load an export folder.

        Args:
            pretrained_model_name_or_path: A local folder. Nothing is ever downloaded: fetch a hub's repository first.
            options: Of the class's own loading.

        Raises:
            CheckpointError: When there is no such folder, or its files do not fit together.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; download the export first and give its local path")
        return cls._from_pretrained(folder, **options)

    def _save_pretrained(self, save_directory: Path, *, max_shard_size: int) -> None:
        raise NotImplementedError

    @classmethod
    def _from_pretrained(cls, folder: Path, **options: Any) -> Self:
        raise NotImplementedError


def parse_size(size: int | str) -> int:
    """Bytes of `5000`, `"5000"` or `"5GB"` (10^9 bytes a GB, as hubs count).

    Raises:
        ConfigError: When it is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", str(size).upper())
    value = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if value <= 0:
        raise ConfigError(f"max_shard_size: got {size!r}; give bytes, or a size like '5GB'")
    return value
