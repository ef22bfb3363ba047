"""Old artefacts read as new ones: one table of the keys and values that were called otherwise in an earlier format.

Checkpoints, exports, run folders and tokenizer folders outlive the words of the code. Whoever reads a configuration
that was stored passes it through `upgrade` before decoding it; whoever composes one from YAML or the command line does
not, so an old word there is an error that names the new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FORMAT = 2
"""What is written now, by artefacts that carry a number."""

Stored = Literal["model", "tokenizer", "run", "loader", "stage"]
"""What a stored configuration is of; a run's holds a model's. A loader's stands in checkpoints beside its position,
a stage's is what it recorded in `stages/`."""


@dataclass(frozen=True)
class _Rename:
    """One key of configurations, wherever it stands in them."""

    since: int
    """The format that has the new words."""
    kinds: tuple[Stored, ...]
    key: str
    """As it was called."""
    new_key: str | None = None
    """As it is called now; None where only values changed."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Old value to new."""


TABLE = (
    _Rename(2, ("model", "run"), "conv_window", values={"seed": "corner", "raster": "centered"}),
    _Rename(2, ("tokenizer",), "picture_size", new_key="image_hw"),
    _Rename(2, ("run",), "pictures", new_key="images"),
    _Rename(2, ("model", "run"), "picture", new_key="returned_shape"),
    _Rename(2, ("stage",), "figures", new_key="metrics"),
    _Rename(2, ("run", "loader"), "lanes", new_key="partitions"),
)


def upgrade(kind: Stored, values: Any, stored_format: int = 1) -> Any:
    """A stored configuration in today's words. Other values, and those of today, come back as they are.

    Args:
        kind: What it is of.
        values: As read from JSON or YAML; left alone.
        stored_format: That of the artefact. Those that carry none are read as format 1: no old word has a new meaning.
    """
    renames = {rename.key: rename for rename in TABLE if kind in rename.kinds and rename.since > stored_format}
    return _renamed(values, renames) if renames else values


def _renamed(values: Any, renames: Mapping[str, _Rename]) -> Any:
    if isinstance(values, list):
        return [_renamed(value, renames) for value in values]
    if not isinstance(values, Mapping):
        return values
    found = {}
    for key, value in values.items():
        rename = renames.get(key)
        new = _renamed(value, renames)
        if rename is not None and isinstance(new, str):
            new = rename.values.get(new, new)
        found[rename.new_key or key if rename is not None else key] = new
    return found
