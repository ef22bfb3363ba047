"""One text tokenizer for every table of the `tokenizers` library."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from tokenizers import Tokenizer as Tables

from tokscale.base.errors import ConfigError, DataError
from tokscale.base.files import atomic_write
from tokscale.base.shapes import Int, Tensor
from tokscale.tokenizers.fingerprint import tokenizer_fingerprint
from tokscale.tokenizers.text.base import AnyTextTokenizer, AnyTextTokenizerConfig

PAD_TOKENS = ("[PAD]", "<pad>", "<PAD>", "<|pad|>")
_VERSION, _TABLES = "text/1", "tokenizer.json"


class TextTokenizerConfig(AnyTextTokenizerConfig):
    """What `config.json` of a text tokenizer folder says beside its `tokenizer.json`."""

    kind: Literal["bpe", "hf", "clip"]
    """Where the tables come from: trained on the user's captions, a Hugging Face folder, or CLIP's vocabulary."""
    id_shift: Literal[0, 1] = 0
    """Added to every id of the tables. 1 where id 0 is a real token there, as in CLIP's vocabulary; 0 where it is
    padding already."""
    add_special_tokens: bool = False
    """Let the tables add their own start, end or class tokens."""


class SubwordTokenizer(AnyTextTokenizer):
    """Captions to ids and back by the tables of the `tokenizers` library."""

    config_class = TextTokenizerConfig

    def __init__(self, tables: Tables, config: TextTokenizerConfig):
        """Wrap tables of the `tokenizers` library.

        Raises:
            ConfigError: When the tables use id 0 for a real token and `id_shift` is 0.
        """
        super().__init__()
        # Lengths are the caller's business, and a caption that spells a special token is still plain text.
        tables.no_truncation()
        tables.no_padding()
        tables.encode_special_tokens = True
        first = tables.id_to_token(0)
        if config.id_shift == 0 and first is not None and first not in PAD_TOKENS:
            raise ConfigError(f"id_shift: got 0, but id 0 of these tables is the real token {first!r}; set id_shift=1")
        self.tables = tables
        self.config = config
        self.num_tokens = max(tables.get_vocab(with_added_tokens=True).values()) + 1 + config.id_shift
        identity = {"id_shift": config.id_shift, "add_special_tokens": config.add_special_tokens}
        self.fingerprint = tokenizer_fingerprint(_VERSION, identity, tables_sha256(tables))

    def encode_ragged(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption at its own length."""
        encodings = self.tables.encode_batch_fast(
            [caption.strip() for caption in captions], add_special_tokens=self.config.add_special_tokens
        )
        if shift := self.config.id_shift:
            return [[token + shift for token in encoding.ids] for encoding in encodings]
        # Tables may know the padding token as a plain word; in a caption it says nothing.
        return [[token for token in encoding.ids if token] for encoding in encodings]

    def numbers(self) -> dict[str, int]:
        """The id of each entry of the tables, as captions have it; padding is none of them."""
        shift = self.config.id_shift
        entries = self.tables.get_vocab(with_added_tokens=True)
        return {word: number + shift for word, number in entries.items() if number + shift}

    def decode(self, ids: Int[Tensor, "batch text"]) -> list[str]:
        """Captions without padding and special tokens."""
        shift = self.config.id_shift
        rows = [[token - shift for token in row if token > 0] for row in ids.tolist()]
        return [text.strip() for text in self.tables.decode_batch(rows, skip_special_tokens=True)]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        with atomic_write(folder / _TABLES) as file:
            file.write(self.tables.to_str(pretty=True).encode())

    @classmethod
    def from_folder(cls, config: TextTokenizerConfig, folder: Path) -> Self:
        """With the tables of `tokenizer.json`. See `AnyTextTokenizer`."""
        return cls(read_tables(folder / _TABLES), config)


def read_tables(path: Path) -> Tables:
    """Tables of the `tokenizers` library.

    Raises:
        DataError: When the file is missing or holds none.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file; the folder is incomplete")
        return Tables.from_str(path.read_text("utf-8"))
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise DataError(f"{path}: not a tokenizer of the `tokenizers` library ({error})") from error


def tables_sha256(tables: Tables) -> str:
    """sha256 of the tables' canonical JSON."""
    text = json.dumps(json.loads(tables.to_str()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
