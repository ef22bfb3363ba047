"""One text tokenizer for every table: ids with a reserved padding id, and a clear answer to long captions."""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import torch
from tokenizers import Tokenizer as Tables

from tokscale.base.config import Config
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.shapes import Bool, Int, Tensor
from tokscale.tokenizers.fingerprint import tokenizer_fingerprint
from tokscale.tokenizers.text.cut import CutCaptions

PAD_TOKENS = ("[PAD]", "<pad>", "<PAD>", "<|pad|>")
_VERSION = "text/1"


class TextTokenizerConfig(Config):
    """What `config.json` of a text tokenizer folder says beside its `tokenizer.json`."""

    kind: Literal["bpe", "hf", "clip"]
    """Where the tables come from: trained on the user's captions, a Hugging Face folder, or CLIP's vocabulary."""
    on_long: Literal["truncate", "error"] = "truncate"
    """What happens to a caption that does not fit: it loses its end and is counted, or it is refused."""
    id_shift: Literal[0, 1] = 0
    """Added to every id of the tables. 1 where id 0 is a real token there, as in CLIP's vocabulary; 0 where it is
    padding already."""
    add_special_tokens: bool = False
    """Let the tables add their own start, end or class tokens."""


class SubwordTokenizer:
    """Captions to ids and back: `base.protocols.TextTokenizer`. Id 0 is padding and never a real token."""

    def __init__(self, tables: Tables, config: TextTokenizerConfig):
        """Wrap tables of the `tokenizers` library.

        Raises:
            ConfigError: When the tables use id 0 for a real token and `id_shift` is 0.
        """
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
        self.cut = CutCaptions()
        """What did not fit so far."""

    def encode(
        self, captions: Sequence[str], length: int
    ) -> tuple[Int[Tensor, "batch text"], Bool[Tensor, "batch text"]]:
        """Ids right-padded with 0 to `length`, and a mask that is True at real tokens.

        White space around a caption is dropped, nothing else is changed but what the tables normalise themselves.

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

    def encode_ragged(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption at its own length."""
        encodings = self.tables.encode_batch_fast(
            [caption.strip() for caption in captions], add_special_tokens=self.config.add_special_tokens
        )
        if shift := self.config.id_shift:
            return [[token + shift for token in encoding.ids] for encoding in encodings]
        # Tables may know the padding token as a plain word; in a caption it says nothing.
        return [[token for token in encoding.ids if token] for encoding in encodings]

    def decode(self, ids: Int[Tensor, "batch text"]) -> list[str]:
        """Captions without padding and special tokens."""
        shift = self.config.id_shift
        rows = [[token - shift for token in row if token > 0] for row in ids.tolist()]
        return [text.strip() for text in self.tables.decode_batch(rows, skip_special_tokens=True)]

    def _cut(self, tokens: list[int], length: int, caption: str) -> list[int]:
        if self.config.on_long == "error":
            shown = caption if len(caption) <= 80 else caption[:77] + "..."
            raise DataError(
                f"the caption {shown!r} has {len(tokens)} tokens, more than the {length} that fit; "
                "raise the text length, or set on_long: truncate"
            )
        return tokens[:length]


def tables_sha256(tables: Tables) -> str:
    """sha256 of the tables' canonical JSON."""
    text = json.dumps(json.loads(tables.to_str()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
