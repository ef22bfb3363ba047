"""What every section of the acceptance is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tokscale.base.config import decode
from tokscale.base.package_data import package_data_path
from tokscale.base.strict_yaml import read_yaml
from tokscale.models.registry import ModelConfig

ROOT = Path(__file__).parents[3]
"""Of a checkout: some sections run what lies in its `tests/`."""


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device
    sizes: Literal["full", "tiny"]
    folder: Path
    """The report's; for files that belong to it."""
    scratch: Path
    """For files that do not."""

    @property
    def tiny(self) -> bool:
        """Whether everything is to be as small as it can be."""
        return self.sizes == "tiny"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Arithmetic that is worth measuring here, the fastest first."""
        return ("fp32",) if self.device.type == "cpu" else ("bf16", "fp32")


def shipped_model(name: str) -> Any:
    """A model's configuration from `configs/model/`, sizes that tokenizers dictate left open."""
    return decode(ModelConfig, read_yaml(package_data_path("configs") / "model" / f"{name}.yaml"))
