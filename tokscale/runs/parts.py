"""Finished parts of a long stage, kept until the whole is written, so that a stage that is ended early goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from tokscale.base.errors import DataError
from tokscale.base.files import atomic_write, read_json, write_json
from tokscale.base.shapes import Tensor
from tokscale.dist.slurm import note_kept

_LETTERS = 16


class Parts:
    """Parts by name, below a folder of the request that they answer: another request never finds them."""

    def __init__(self, folder: Path, request: str):
        """Nothing is read or written yet.

        Args:
            folder: Of the parts alone; those of other requests in it are removed with the first that is kept.
            request: Fingerprint of all that the parts depend on.
        """
        self._all, self._folder = folder, folder / request[:_LETTERS]

    def tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The part of that name, made now if it was not kept before."""
        path = self._folder / f"{name}.safetensors"
        try:
            return load_file(path)["part"]
        except (FileNotFoundError, SafetensorError):
            made = make()
        self._prepare()
        with atomic_write(path) as file:
            file.write(save({"part": made.contiguous()}))
        note_kept()
        return made

    def values(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """As `tensor`, of numbers and words."""
        path = self._folder / f"{name}.json"
        try:
            return read_json(path)
        except DataError:
            made = make()
        self._prepare()
        write_json(path, made)
        note_kept()
        return made

    def clear(self) -> None:
        """Remove all: the whole is written."""
        shutil.rmtree(self._all, ignore_errors=True)

    def _prepare(self) -> None:
        if not self._folder.exists():
            self.clear()
            self._folder.mkdir(parents=True)
