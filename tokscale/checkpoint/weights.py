"""An export folder, read: `config.json` and the weights beside it, whole or in shards. Needs nothing but the folder."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from tokscale.base.config import Config, StoredName, decode
from tokscale.base.errors import CheckpointError
from tokscale.base.files import read_json
from tokscale.base.formats import FORMAT, upgrade
from tokscale.base.modules import trial_build
from tokscale.checkpoint.tensorfile import TensorFile, as_bytes

CONFIG, WEIGHTS, WEIGHTS_INDEX, EXPORT_MANIFEST = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "manifest.json",
)


def read_config(folder: Path | str) -> dict[str, Any]:
    """The model configuration of an export, as a plain mapping with its `kind`, in today's words.

    Raises:
        CheckpointError: When it is missing or damaged.
    """
    path = Path(folder) / CONFIG
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; give a folder that `tokscale export` wrote")
    read_export_manifest(folder)  # of a newer format, it would be refused for a word that is not known here
    return upgrade("model", read_json(path, refuse=CheckpointError))


def read_export_manifest(folder: Path | str) -> dict[str, Any] | None:
    """What the exporter recorded: source, dtype, tied weights, sha256 of every tensor. None for a foreign folder.

    Raises:
        CheckpointError: When it is damaged, or of a newer format than is read here.
    """
    path = Path(folder) / EXPORT_MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path, refuse=CheckpointError)
    number = manifest.get("format")
    if isinstance(number, int) and number > FORMAT:
        raise CheckpointError(
            f"{path}: an export of format {number}, by tokscale {manifest.get('tokscale')!r:.40}; formats up to "
            f"{FORMAT} are read here: install a newer tokscale, or export again with this one"
        )
    for part, inner in (("about", str), ("tensors", dict)):
        values = manifest.get(part, {})
        if not isinstance(values, dict) or (inner is dict and not all(isinstance(v, dict) for v in values.values())):
            raise CheckpointError(f"{path}: {part!r} is not what an export writes; export again")
    return manifest


def require_fit(build: Callable[[], nn.Module], folder: Path | str) -> None:
    """Refuse an export whose weights are not its configuration's, before memory is taken for either.

    Args:
        build: Makes the model of the configuration.
        folder: The export.

    Raises:
        CheckpointError: See `load_weights`; or when the configuration states sizes of which no model can be built.
    """
    with WeightFolder(folder) as stored:
        with trial_build(str(Path(folder) / CONFIG), len(stored.names()), CheckpointError):
            model = build()
        _require_fit(model, stored)


def _require_fit(model: nn.Module, stored: "WeightFolder") -> dict[str, Tensor]:
    """The model's tensors by name, which are just those that are stored."""
    own = model_tensors(model)
    check_fit(
        {name: tuple(tensor.shape) for name, tensor in own.items()},
        {name: stored.shape(name) for name in stored.names()},
        where=str(stored.folder),
        tied=tied_names(model),
    )
    for name, tensor in own.items():
        found = stored.dtype(name)
        if (found.is_floating_point, found == torch.bool) != (tensor.is_floating_point(), tensor.dtype == torch.bool):
            raise CheckpointError(f"{stored.folder}: {name!r} is stored as {found}, the model says {tensor.dtype}")
    return own


def load_weights(model: nn.Module, folder: Path | str, *, as_stored: bool = False, verify: bool = True) -> None:
    """Fill a model from an export: every tensor of the model and no other, tied weights once.

    Args:
        model: With real (not meta) tensors, on any device.
        folder: The export.
        as_stored: Give the model's tensors the stored dtypes, instead of converting the values to the model's.
        verify: Check every tensor's sha256 against the export's manifest, if it has one.

    Raises:
        CheckpointError: Listing what is missing, unknown or of another shape; or naming what is damaged. The model is
            unchanged when names or shapes do not fit.
    """
    with WeightFolder(folder) as stored:
        own = _require_fit(model, stored)
        hashes = (read_export_manifest(folder) or {}).get("tensors", {}) if verify else {}
        with torch.no_grad():
            for name, tensor in own.items():
                value = stored.read(name)
                _check_hash(folder, name, value, hashes)
                value = value.view(tensor.shape)
                if as_stored:
                    tensor.data = value.to(tensor.device)
                else:
                    tensor.copy_(value)


def check_weights(stored: "WeightFolder", names: Iterable[str]) -> None:
    """The tensors' bytes are those that the exporter wrote, as far as it left hashes. Reads them.

    Raises:
        CheckpointError: With the first damaged one.
    """
    hashes = (read_export_manifest(stored.folder) or {}).get("tensors", {})
    for name in names:
        _check_hash(stored.folder, name, stored.read(name), hashes)


def _check_hash(folder: Path | str, name: str, value: Tensor, hashes: Mapping[str, Any]) -> None:
    expected = hashes.get(name, {}).get("sha256")
    if expected is not None and hashlib.sha256(as_bytes(value)).hexdigest() != expected:
        raise CheckpointError(f"{folder}: {name!r} is damaged, its sha256 is not the manifest's; export it again")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model by name; a tied one once, under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every further name of a tied tensor, and the first name, under which it is stored."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in model.state_dict(keep_vars=True).items()
        if first.setdefault(id(tensor), name) != name
    }


def check_fit(
    wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]], *, where: str, tied: dict[str, str]
) -> None:
    """Names and shapes agree exactly; a stored second name of a tied weight is tolerated.

    Raises:
        CheckpointError: Listing the first differences.
    """
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is unknown to the model" for name in stored if name not in wanted and name not in tied]
    problems += [
        f"{name} has shape {stored[name]}, the model says {shape}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit the model: {'; '.join(problems[:8])}")


class WeightIndex(Config):
    """The content of `model.safetensors.index.json`, as the transformers library writes it, too."""

    model_config = ConfigDict(extra="ignore")

    weight_map: dict[str, StoredName]
    """Which file, in the same folder, holds each tensor."""


class WeightFolder:
    """The tensors of an export, by name, over one file or several."""

    def __init__(self, folder: Path | str):
        """Open every file's header.

        Raises:
            CheckpointError: When a file is missing or damaged.
        """
        self.folder = Path(folder)
        self._files: dict[str, TensorFile] = {}
        self._places: dict[str, TensorFile] = {}
        try:
            for name, file in self._listing().items():
                if file not in self._files:
                    self._files[file] = TensorFile(self.folder / file)
                if name not in self._files[file].keys():  # noqa: SIM118 - not a mapping
                    raise CheckpointError(f"{self.folder / file}: has no {name!r}, which the index says it has")
                self._places[name] = self._files[file]
        except BaseException:
            self.close()
            raise

    def names(self) -> tuple[str, ...]:
        """Stored names."""
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._places[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._places[name].dtype(name)

    def read(self, name: str) -> Tensor:
        """A whole tensor, one-dimensional, on the CPU, as stored.

        Raises:
            CheckpointError: When the file is damaged.
        """
        return self.read_range(name, 0, math.prod(self.shape(name)))

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a tensor, as `read`."""
        file = self._places[name]
        out = torch.empty(stop - start, dtype=file.dtype(name))
        file.read(name, start, out)
        return out

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> "WeightFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listing(self) -> dict[str, str]:
        if (self.folder / WEIGHTS).exists():
            self._files[WEIGHTS] = TensorFile(self.folder / WEIGHTS)
            return dict.fromkeys(self._files[WEIGHTS].keys(), WEIGHTS)
        if not (self.folder / WEIGHTS_INDEX).exists():
            raise CheckpointError(f"{self.folder}: neither {WEIGHTS} nor {WEIGHTS_INDEX}, so this is not an export")
        path = self.folder / WEIGHTS_INDEX
        index = decode(WeightIndex, read_json(path, refuse=CheckpointError), where=str(path), refuse=CheckpointError)
        return index.weight_map
