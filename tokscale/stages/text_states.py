"""The states of a text encoder in training: where a run has them from, and what an export keeps of the encoder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tokscale.base.config import Config, decode
from tokscale.base.errors import CheckpointError, DataError
from tokscale.base.protocols import TextEncoder
from tokscale.data.loading.token_config import TextEmbeds
from tokscale.data.tokens.embeds import EmbedStore
from tokscale.data.tokens.manifest import TokenDataset
from tokscale.inference.text_encoder import COPY, RECORD, EncoderRecord, load_recorded_encoder, needs_encoder
from tokscale.models.common import fit_condition
from tokscale.runs.stage import StageConfig
from tokscale.tokenizers.text import load_text_encoder

C = TypeVar("C", bound=Config)


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


def online_states(config: StageConfig, model: Config, device: torch.device) -> TextStates | None:
    """States that are made in training: every rank opens the encoder, since each needs its weights.

    None when the model needs none, or no encoder is named.
    """
    if config.text_encoder is None or not needs_encoder(model):
        return None
    return _online(config, config.text_encoder, device)


def text_states(
    config: StageConfig, model: Config, datasets: Sequence[TokenDataset], *, source: TextEmbeds
) -> TextStates | None:
    """States that are stored beside the captions; None when the model needs none, or they are made in training.

    Raises:
        DataError: When they are not stored, or are of another encoder than the one that is named.
    """
    return _stored(config, datasets) if source == "stored" and needs_encoder(model) else None


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
    record = decode(EncoderRecord, facts, where="checkpoint, text_encoder", refuse=CheckpointError)
    if given is not None or copy:
        record = record.model_copy(update={"path": (given or record.path).resolve()})
        load_recorded_encoder(record, record.path, "cpu")
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
