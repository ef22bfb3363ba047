"""What every text tokenizer offers: ids with a reserved padding id, and a clear answer to long captions."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch

from tokscale.base.config import Config
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.shapes import Bool, Int, Tensor
from tokscale.tokenizers.text.cut import CutCaptions

OnLong = Literal["truncate", "error"]


class AnyTextTokenizerConfig(Config):
    """Base of what `config.json` of a text tokenizer's folder says. A subclass has a `kind`."""

    on_long: OnLong = "truncate"
    """What happens to a caption that does not fit: it loses its end and is counted, or it is refused."""


class TextTrainingConfig(Config):
    """Base of how a text tokenizer is trained on captions. A subclass has the `kind` of what it makes."""

    on_long: OnLong = "truncate"
    """What to do with captions beyond the model's `text_seq_len`: cut and count them, or refuse."""


class AnyTextTokenizer(ABC):
    """Captions to ids and back: `base.protocols.TextTokenizer`. Id 0 is padding and never a real token."""

    config_class: ClassVar[type[AnyTextTokenizerConfig]]
    """What its folder's `config.json` is decoded into."""
    training_config: ClassVar[type[TextTrainingConfig] | None] = None
    """How `train-tokenizer` is asked to train it; None for one that comes as it is."""
    config: Any
    num_tokens: int
    """Ids, padding included."""
    fingerprint: str
    """See `tokenizers.fingerprint`: whatever decides ids."""

    def __init__(self) -> None:
        self.cut = CutCaptions()
        """What did not fit so far."""

    @abstractmethod
    def encode_ragged(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption at its own length."""

    @abstractmethod
    def decode(self, ids: Int[Tensor, "batch text"]) -> list[str]:
        """Captions without padding and special tokens."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `from_folder` reads beside `config.json`.

        Raises:
            StorageError: When the file system refuses.
        """

    @classmethod
    @abstractmethod
    def from_folder(cls, config: Any, folder: Path) -> Self:
        """The tokenizer in a folder whose `config.json` said `config`.

        Raises:
            DataError: When a file is missing or damaged.
        """

    @classmethod
    def trained(cls, config: Any, captions: Iterable[str], folder: Path) -> Self:
        """One made of captions, which are read once. `folder`, which it will go into, is named in errors.

        Raises:
            DataError: When there is no caption.
        """
        raise ConfigError(f"{folder}: a text tokenizer of {cls.__name__} is not trained here")

    def encode(
        self, captions: Sequence[str], length: int
    ) -> tuple[Int[Tensor, "batch text"], Bool[Tensor, "batch text"]]:
        """Ids right-padded with 0 to `length`, and a mask that is True at real tokens.

        White space around a caption is dropped, nothing else is changed but what the tokenizer normalises itself.

        Raises:
            DataError: When a caption has more than `length` tokens and `on_long` is `error`.
        """
        ids = torch.zeros(len(captions), length, dtype=torch.int64)
        mask = torch.zeros(len(captions), length, dtype=torch.bool)
        for row, tokens in enumerate(self.encode_ragged(captions)):
            self.cut.add(len(tokens), length)
            if len(tokens) > length:
                tokens = self._cut(tokens, length, captions[row])
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = True
        return ids, mask

    def _cut(self, tokens: list[int], length: int, caption: str) -> list[int]:
        if self.config.on_long == "error":
            shown = caption if len(caption) <= 80 else caption[:77] + "..."
            raise DataError(
                f"the caption {shown!r} has {len(tokens)} tokens, more than the {length} that fit; "
                "raise the text length, or set on_long: truncate"
            )
        return tokens[:length]
