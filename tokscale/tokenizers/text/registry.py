"""Every text tokenizer by the `kind` in its folder. Installed packages add theirs under `tokscale.text_tokenizers`."""

from typing import Annotated, Any

from tokscale.base.registry import ConfigOf, Registry, admitted
from tokscale.tokenizers.text.base import AnyTextTokenizer, TextTrainingConfig
from tokscale.tokenizers.text.bpe import BPETokenizer
from tokscale.tokenizers.text.tokenizer import SubwordTokenizer


def _admitted(name: str, offered: Any) -> type[AnyTextTokenizer]:
    """A text tokenizer's class, if that is what a package offers.

    Raises:
        TypeError: When it lacks a part, or its configurations have another kind than its name.
    """
    known = admitted(name, offered, AnyTextTokenizer, (), {"config_class": False, "training_config": True})
    if known.training_config is not None and "trained" not in {
        part for base in known.__mro__[:-3] for part in vars(base)
    }:
        raise TypeError(f"{known.__name__} has a training_config, but lacks trained")
    return known


TEXT_TOKENIZERS: Registry[type[AnyTextTokenizer]] = Registry(
    "text tokenizer", group="tokscale.text_tokenizers", admit=_admitted
)
for _kind, _tokenizer in (("bpe", BPETokenizer), ("hf", SubwordTokenizer), ("clip", SubwordTokenizer)):
    TEXT_TOKENIZERS.add(_kind, _admitted(_kind, _tokenizer))


def _training_config(tokenizer: type[AnyTextTokenizer]) -> type[TextTrainingConfig]:
    assert tokenizer.training_config is not None
    return tokenizer.training_config


TEXT_TRAINING = ConfigOf(TEXT_TOKENIZERS, _training_config, lambda tokenizer: tokenizer.training_config is not None)
AnyTraining = Annotated[TextTrainingConfig, TEXT_TRAINING]
"""How any text tokenizer is trained, discriminated by `kind`."""


def trained_class(config: TextTrainingConfig) -> type[AnyTextTokenizer]:
    """The class of what a configuration asks to train."""
    return next(known for known in TEXT_TOKENIZERS.usable().values() if known.training_config is type(config))
