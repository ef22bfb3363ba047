"""What the user lets run that came in a file. Nothing, unless a key says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokscale.base.errors import ConfigError

_torchscript = False


@contextmanager
def allow_torchscript(allowed: bool = True) -> Iterator[None]:
    """Let TorchScript programs be loaded inside the context, in the whole process.

    The say is the user's, by the key `allow_torchscript`: a folder that holds a program cannot give it to itself.
    """
    global _torchscript
    before, _torchscript = _torchscript, _torchscript or allowed
    try:
        yield
    finally:
        _torchscript = before


def require_torchscript(path: Path) -> None:
    """Refuse a program that nobody allowed.

    Raises:
        ConfigError: Unless `allow_torchscript` is around.
    """
    if not _torchscript:
        raise ConfigError(
            f"allow_torchscript: {path} is a TorchScript program, and loading it runs what its author wrote; if you "
            "trust the author, set allow_torchscript=true (in Python: tokscale.load(..., allow_torchscript=True), or "
            "`with tokscale.base.trust.allow_torchscript():`)"
        )
