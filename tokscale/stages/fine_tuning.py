"""What `train` needs to go on from another model's weights on other captions, classes or sizes of images."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tokscale.base.config import decode, kind_of
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.files import read_json_texts
from tokscale.checkpoint.resizing import Resizing
from tokscale.checkpoint.weights import CONFIG, read_config
from tokscale.data.tokens.manifest import CLASSES
from tokscale.models.registry import ModelConfig, build_model
from tokscale.stages.inputs import Inputs
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer
from tokscale.tokenizers.text.tokenizer import SubwordTokenizer


def resizing_for(inputs: Inputs, export: Path, *, image_tokenizer: Path, run_dir: Path) -> Resizing:
    """How the weights of `export` become those of the model that is trained.

    Args:
        inputs: The model, and the tokenizers whose ids it reads.
        export: With its tokenizers.
        image_tokenizer: Folder of the one whose codes are read.
        run_dir: Holds the names of the data's classes, where there are any.

    Raises:
        ConfigError: When it is no export, or of another kind of model.
    """
    if not (export / CONFIG).exists():
        raise ConfigError(
            f"init_resize: {export} is no export, and only exports bring their tokenizers; export it first"
        )
    stored = decode(ModelConfig, read_config(export), where=str(export / CONFIG), refuse=CheckpointError)
    if kind_of(stored) != kind_of(inputs.model):
        raise ConfigError(
            f"init_from: {export} holds a {kind_of(stored)}, and model.kind={kind_of(inputs.model)}; give an export of "
            f"that, or model.kind={kind_of(stored)} and the options of {export / CONFIG}"
        )
    with torch.device("meta"):
        own, before = build_model(inputs.model).rows(), build_model(stored).rows()
    entries: dict[str, Sequence[int] | None] = {}
    if (words := _words(inputs, export / "text_tokenizer")) is not _SAME:
        entries["words"] = words
    if inputs.image is not None and (export / "image_tokenizer").exists():
        image = load_image_tokenizer(export / "image_tokenizer")
        # The same weights give the same codes at any size of images, under another fingerprint.
        if image.codec.content_sha256() != load_image_tokenizer(image_tokenizer).codec.content_sha256():
            entries["codes"] = None
    if (classes := _classes(run_dir / CLASSES, export / CLASSES)) is not _SAME:
        entries["classes"] = classes
    return Resizing(own, before, entries)


_SAME: tuple[int, ...] = ()
"""Entries have the same numbers there and here."""


def _words(inputs: Inputs, stored: Path) -> Sequence[int] | None:
    text = inputs.text
    if text is None:
        return _SAME
    before = load_text_tokenizer(stored) if stored.exists() else None
    if before is not None and before.fingerprint == text.fingerprint:
        return _SAME
    if not (isinstance(before, SubwordTokenizer) and isinstance(text, SubwordTokenizer)):
        return None
    there = before.numbers()
    found = [-1] * text.num_tokens
    for word, number in text.numbers().items():
        found[number] = there.get(word, -1)
    found[0] = 0  # padding
    return found


def _classes(here: Path, there: Path) -> Sequence[int] | None:
    if not (here.exists() and there.exists()):
        return _SAME
    before = {name: number for number, name in enumerate(read_json_texts(there))}
    now = read_json_texts(here)
    return _SAME if list(before) == now else [before.get(name, -1) for name in now]
