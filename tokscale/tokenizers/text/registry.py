"""Every text tokenizer by the `kind` in its folder. Installed packages add theirs under `tokscale.text_tokenizers`."""

import inspect
from typing import Annotated, Any, get_args

from tokscale.base.registry import ConfigOf, Registry
from tokscale.tokenizers.text.base import AnyTextTokenizer, AnyTextTokenizerConfig, TextTrainingConfig
from tokscale.tokenizers.text.bpe import BPETokenizer
from tokscale.tokenizers.text.tokenizer import SubwordTokenizer


def _admitted(name: str, offered: Any) -> type[AnyTextTokenizer]:
    """A text tokenizer's class, if that is what a package offers.

    Raises:
        TypeError: When it lacks a part, or its configurations have another kind than its name.
    """
    if not (inspect.isclass(offered) and issubclass(offered, AnyTextTokenizer)):
        raise TypeError(f"{offered!r} is no subclass of tokscale.tokenizers.text.base.AnyTextTokenizer")
    missing = sorted(offered.__abstractmethods__) + [part for part in ("config_class",) if not hasattr(offered, part)]
    if offered.training_config is not None and offered.trained.__func__ is AnyTextTokenizer.trained.__func__:
        missing.append("trained")
    if missing:
        raise TypeError(f"{offered.__name__} lacks {', '.join(missing)}")
    bases = {AnyTextTokenizerConfig: offered.config_class, TextTrainingConfig: offered.training_config}
    for base, config in bases.items():
        if config is not None and not issubclass(config, base):
            raise TypeError(f"{config.__name__} of {offered.__name__} is no subclass of {base.__name__}")
        if config is not None and name not in get_args(config.model_fields["kind"].annotation):
            raise TypeError(f"{config.__name__} of {offered.__name__} has no kind={name!r}")
    return offered


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
