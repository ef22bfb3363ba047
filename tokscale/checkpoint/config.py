"""How often to save, how much to keep, how hard to look before trusting what is there."""

from typing import Literal, NamedTuple

from pydantic import Field

from tokscale.base.config import Config
from tokscale.base.kinds import for_each

Verify = Literal["sizes", "read", "full"]


class Hashed(NamedTuple):
    """When contents are held to their hashes, beyond names and sizes."""

    before: bool = False
    """Before anything is loaded, every byte of every file."""
    loading: bool = False
    """While ranges are read, what is read."""


HASHED = for_each(Verify, {"sizes": Hashed(), "read": Hashed(loading=True), "full": Hashed(before=True)})


class CheckpointConfig(Config):
    """Saving and keeping of sharded checkpoints."""

    every_steps: int = Field(default=1000, ge=1)
    """Optimizer steps between saves; one more is made at the end and when asked to stop."""
    keep_last: int = Field(default=3, ge=2)
    """How many of the newest complete checkpoints stay. Never below two: the newest may turn out damaged."""
    keep_every: int = Field(default=0, ge=0)
    """Steps whose multiples stay for ever, e.g. for averaging or evaluation later; 0 keeps none."""
    async_save: bool = False
    """Write in a background thread: training waits only for a copy of this rank's shard in host memory."""
    verify: Verify = "read"
    """What a checkpoint must pass to be resumed from. `sizes`: every file is there, with its size and this save's mark.
    `read`: also, while it is loaded, every file's sha256, and finite values. `full`: the hashes before anything is
    loaded, which reads everything twice."""
