"""DeepSpeed's own saving, as a baseline to measure ours against; never a way to resume (see `tokscale.checkpoint`)."""

from pathlib import Path

from tokscale.base.protocols import Engine
from tokscale.engine.zero import ZeroEngine


def save_native(engine: Engine, folder: Path, tag: str) -> None:
    """Write what `deepspeed.save_checkpoint` writes of an engine's state. Collective, synchronous.

    Raises:
        TypeError: When the engine is not DeepSpeed's.
    """
    if not isinstance(engine, ZeroEngine):
        raise TypeError(
            f"engine {engine.name!r} is a {type(engine).__name__}; only a ZeroEngine has DeepSpeed's saving"
        )
    engine._deepspeed.save_checkpoint(str(folder), tag=tag)
