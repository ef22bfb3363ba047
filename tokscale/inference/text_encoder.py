"""The text encoder of an export: how it says which one its model needs, and how that one is opened."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt

from tokscale.base.config import Config, PathKey, decode
from tokscale.base.errors import CheckpointError, DataError
from tokscale.base.files import read_json
from tokscale.base.protocols import TextEncoder
from tokscale.models.common import condition_of
from tokscale.tokenizers.text import load_text_encoder

COPY = "text_encoder"
"""Folder of an export that holds a copy of the encoder, if one was asked for."""
RECORD = "text_encoder.json"
"""File of an export that says which encoder its model was trained with."""


class EncoderRecord(Config):
    """The content of `text_encoder.json`."""

    path: PathKey
    """Where the encoder lay when the model was trained; relative to the export when it holds a copy."""
    fingerprint: str
    """Of the encoder whose states the model knows."""
    precision: Literal["fp32", "bf16"]
    """Part of the fingerprint, as is the next."""
    length: PositiveInt
    """Captions are cut to so many of the encoder's tokens."""


def needs_encoder(model: Config) -> bool:
    """Whether a model is told the states of a text encoder."""
    return condition_of(model).reads_states


def exported_encoder(
    folder: Path, model: Config, given: TextEncoder | Path | str | None, device: torch.device
) -> TextEncoder | None:
    """The encoder of an export, None when its model needs none.

    Args:
        folder: The export.
        model: Its model's configuration.
        given: The encoder or its folder, when it is not where the export says.
        device: Where to encode.

    Raises:
        DataError: Naming the folder that is missing, or both fingerprints when it is another encoder.
    """
    if not needs_encoder(model):
        return None
    described = folder / RECORD
    if not described.exists():
        if given is not None and not isinstance(given, str | Path):
            return given
        if given is None:
            raise DataError(
                f"{folder}: its model needs the states of a text encoder, and no {RECORD} says of which; "
                "give text_encoder=FOLDER"
            )
        return load_text_encoder(given, device=device)
    record = decode(EncoderRecord, read_json(described), where=str(described), refuse=CheckpointError)
    if given is not None and not isinstance(given, str | Path):
        return _require(record, given, "the given encoder")
    path = Path(given) if given is not None else folder / record.path
    if not path.is_dir():
        raise DataError(
            f"{folder}: its model was trained on the states of the text encoder {record.fingerprint[:12]} in {path}, "
            "which is not there; give text_encoder=FOLDER"
        )
    return load_recorded_encoder(record, path, device)


def load_recorded_encoder(record: EncoderRecord, path: Path, device: torch.device | str) -> TextEncoder:
    """The encoder in a folder.

    Raises:
        DataError: When it is another one than the record says, naming both fingerprints.
    """
    encoder = load_text_encoder(path, precision=record.precision, length=record.length, device=device)
    return _require(record, encoder, str(path))


def _require(record: EncoderRecord, encoder: TextEncoder, where: str) -> TextEncoder:
    if encoder.fingerprint != record.fingerprint:
        raise DataError(
            f"{where}: is not the text encoder this model was trained with: its fingerprint is "
            f"{encoder.fingerprint[:12]}, the model knows {record.fingerprint[:12]}; give text_encoder=FOLDER"
        )
    return encoder
