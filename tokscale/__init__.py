"""Train image-token transformers at scale: DALL-E, Parti, MaskGIT/Muse and RQ-Transformer.

Importing the package imports nothing heavy; `tokscale.load` does when it is first used.
"""

from typing import Any

__version__ = "0.2.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from tokscale.inference.loading import load

        return load
    raise AttributeError(f"module 'tokscale' has no attribute {name!r}")
