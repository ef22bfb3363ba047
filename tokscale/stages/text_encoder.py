"""The text encoder of a run: which one a configuration names, and how an export says which one it needs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from tokscale.base.config import Config, decode
from tokscale.base.errors import DataError
from tokscale.base.files import read_json
from tokscale.base.protocols import TextEncoder
from tokscale.data.embeds import EmbedStore
from tokscale.data.manifest import TokenDataset
from tokscale.models.common import condition_of, fit_condition
from tokscale.nn.conditioning import EmbeddingsConfig
from tokscale.stages.common import StageConfig
from tokscale.tokenizers.text import load_text_encoder

C = TypeVar("C", bound=Config)

COPY = "text_encoder"
"""Folder of an export that holds a copy of the encoder, if one was asked for."""
RECORD = "text_encoder.json"
"""File of an export that says which encoder its model was trained with."""


class EncoderRecord(Config):
    """The content of `text_encoder.json`."""

    path: Path
    """Where the encoder lay when the model was trained; relative to the export when it holds a copy."""
    fingerprint: str
    """Of the encoder whose states the model knows."""
    precision: Literal["fp32", "bf16"]
    """Part of the fingerprint, as is the next."""
    length: int
    """Captions are cut to so many of the encoder's tokens."""


def needs_encoder(model: Config) -> bool:
    """Whether a model is told the states of a text encoder."""
    return isinstance(condition_of(model), EmbeddingsConfig)


@dataclass(frozen=True)
class TextStates:
    """Where a training run has the states of a text encoder from."""

    record: EncoderRecord
    """Whose they are."""
    width: int
    """Of each state."""
    encoder: TextEncoder | None = None
    """Reads the captions of each batch; or"""
    stores: tuple[EmbedStore, ...] = ()
    """hold what it gave for each source."""


def text_states(
    config: StageConfig,
    model: Config,
    datasets: Sequence[TokenDataset],
    device: torch.device,
    *,
    source: Literal["online", "stored"],
) -> TextStates | None:
    """The states that a stage's configuration names; None when the model needs none, or no encoder is named.

    Raises:
        DataError: When states are not stored, or are of another encoder than the one that is named.
    """
    if not needs_encoder(model):
        return None
    if source == "stored":
        return _stored(config, datasets)
    return None if config.text_encoder is None else _online(config, config.text_encoder, device)


def _online(config: StageConfig, path: Path, device: torch.device | str) -> TextStates:
    encoder = load_text_encoder(
        path, precision=config.text_encoder_precision, length=config.text_encoder_length, device=device
    )
    record = EncoderRecord(
        path=path.resolve(),
        fingerprint=encoder.fingerprint,
        precision=encoder.precision,
        length=encoder.length,
    )
    return TextStates(record, encoder.width, encoder=encoder)


def _stored(config: StageConfig, datasets: Sequence[TokenDataset]) -> TextStates:
    stores = tuple(EmbedStore(dataset) for dataset in datasets)
    about = stores[0].about
    record = EncoderRecord(
        path=config.text_encoder or about.path,
        fingerprint=about.encoder,
        precision=about.precision,
        length=about.length,
    )
    for dataset, store in zip(datasets, stores, strict=True):
        if store.fingerprint != about.encoder:
            raise DataError(
                f"{dataset.folder}: holds the states of the text encoder {store.fingerprint[:12]}, "
                f"{datasets[0].folder} those of {about.encoder[:12]}; embed both with the same one"
            )
    if config.text_encoder is not None:
        named = load_text_encoder(
            config.text_encoder, precision=config.text_encoder_precision, length=config.text_encoder_length
        )
        if named.fingerprint != about.encoder:
            raise DataError(
                f"{datasets[0].folder}: holds the states of the text encoder {about.encoder[:12]} ({about.path}, "
                f"{about.precision}, {about.length} tokens), this run names {named.fingerprint[:12]}; name the one "
                "that made them, leave text_encoder out, or set data.text_embeds=online"
            )
    return TextStates(record, stores[0].width, stores=stores)


def encoder_files(facts: dict[str, Any], given: Path | None, *, copy: bool, scratch: Path) -> dict[str, Path]:
    """What an export holds of the encoder, by name: the record, and the folder itself where a copy is asked for.

    Args:
        facts: Of the checkpoint.
        given: Where the encoder lies now, if it was moved.
        copy: Put the encoder into the export.
        scratch: An empty folder for the record.

    Raises:
        DataError: When the encoder is not there, or is not the one the model was trained with.
    """
    record = decode(EncoderRecord, facts, where="checkpoint, text_encoder")
    if given is not None or copy:
        record = record.model_copy(update={"path": (given or record.path).resolve()})
        _load(record, record.path, "cpu")
    files = {COPY: record.path} if copy else {}
    if copy:
        record = record.model_copy(update={"path": Path(COPY)})
    return files | _written(record, scratch)


def imported_encoder(config: StageConfig, model: C, scratch: Path) -> tuple[C, dict[str, Path]]:
    """A model from elsewhere that is told an encoder's states, and what its export holds of the encoder that is named.

    Args:
        config: Names the encoder, if it is here.
        model: The model's configuration.
        scratch: An empty folder for the record.

    Raises:
        ConfigError: When the encoder's states are of another width than the model's.
    """
    if config.text_encoder is None:
        return model, {}
    states = _online(config, config.text_encoder, "cpu")
    return fit_condition(model, encoder=states), _written(states.record, scratch)


def _written(record: EncoderRecord, scratch: Path) -> dict[str, Path]:
    (scratch / RECORD).write_text(json.dumps(record.model_dump(mode="json"), indent=2) + "\n")
    return {RECORD: scratch / RECORD}


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
    record = decode(EncoderRecord, read_json(described), where=str(described))
    if given is not None and not isinstance(given, str | Path):
        return _require(record, given, "the given encoder")
    path = Path(given) if given is not None else folder / record.path
    if not path.is_dir():
        raise DataError(
            f"{folder}: its model was trained on the states of the text encoder {record.fingerprint[:12]} in {path}, "
            "which is not there; give text_encoder=FOLDER"
        )
    return _load(record, path, device)


def _load(record: EncoderRecord, path: Path, device: torch.device | str) -> TextEncoder:
    encoder = load_text_encoder(path, precision=record.precision, length=record.length, device=device)
    return _require(record, encoder, str(path))


def _require(record: EncoderRecord, encoder: TextEncoder, where: str) -> TextEncoder:
    if encoder.fingerprint != record.fingerprint:
        raise DataError(
            f"{where}: is not the text encoder this model was trained with: its fingerprint is "
            f"{encoder.fingerprint[:12]}, the model knows {record.fingerprint[:12]}; give text_encoder=FOLDER"
        )
    return encoder
