"""Train image-token transformers at scale: DALL-E, Parti, MaskGIT/Muse and RQ-Transformer.

Importing the package imports nothing heavy; `tokscale.load`, `load_dataset` and `Trainer` do when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokscale.inference.loading import load, load_dataset
    from tokscale.stages.trainer import Trainer

__version__ = "0.2.0"
__all__ = ["Trainer", "__version__", "load", "load_dataset"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in ("load", "load_dataset"):
        from tokscale.inference import loading

        return getattr(loading, name)
    if name == "Trainer":
        from tokscale.stages.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'tokscale' has no attribute {name!r}")
