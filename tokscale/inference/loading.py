"""`tokscale.load`: whatever an export folder holds, ready to use."""

from pathlib import Path
from typing import Any

from tokscale.base.address import is_address
from tokscale.base.errors import CheckpointError, DataError
from tokscale.checkpoint.weights import read_config
from tokscale.data.raw.shards import RawDataset, in_order
from tokscale.data.tokens.manifest import MANIFEST, TokenDataset
from tokscale.inference.pretrained import Pretrained, load_pretrained
from tokscale.inference.scorer import Scorer, load_scorer
from tokscale.models.model import GenerativeModel
from tokscale.models.registry import MODELS


def load(folder: Path | str, **options: Any) -> Pretrained | Scorer:
    """Load an export: a `Pretrained` that draws, or the `Scorer` that a CLIP is.

    Args:
        folder: Written by `tokscale export` or `tokscale import`.
        options: `device`, `dtype` and more, see `load_pretrained` and `load_scorer`.

    Raises:
        CheckpointError: When a file is missing or does not fit the configuration.
    """
    kind = str(read_config(Path(folder)).get("kind"))
    if kind not in MODELS:
        raise CheckpointError(f"{folder}, config.json, kind: got {kind!r}{MODELS.advice(kind)}")
    model = MODELS[kind]
    if issubclass(model, GenerativeModel):
        return load_pretrained(folder, **options)
    return load_scorer(folder, **options)


def load_dataset(folder: Path | str) -> TokenDataset | RawDataset:
    """Open what `tokscale tokenize` or `tokscale prepare` wrote: token shards, or images with their captions.

    Args:
        folder: Of the shards; token shards may lie behind an address.

    Raises:
        DataError: When there are none, or they are not finished.
    """
    if isinstance(folder, str) and is_address(folder):
        return TokenDataset(folder)
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        return TokenDataset(folder)
    if in_order(file.name for file in folder.glob("*")):
        return RawDataset(folder)
    raise DataError(f"{folder}: holds neither token shards ({MANIFEST}) nor raw ones (*.tar)")
