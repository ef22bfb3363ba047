"""Byte-level BPE trained on captions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tokscale.base.config import encode
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.files import write_json
from tokscale.tokenizers.text.base import OnLong, TextTrainingConfig
from tokscale.tokenizers.text.tokenizer import PAD_TOKENS, SubwordTokenizer, TextTokenizerConfig

SMALLEST_VOCABULARY = 1 + 256
"""Padding and every byte: with these no caption needs an unknown token."""


class BPEConfig(TextTrainingConfig):
    """Byte-level BPE trained on the captions of the raw shards."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(default=16_384, ge=257)
    """Upper bound on ids, padding included; captions of few words fill less. DALL-E: 16,384."""


class BPETokenizer(SubwordTokenizer):
    """What `train_bpe` makes."""

    training_config = BPEConfig

    @classmethod
    def trained(cls, config: BPEConfig, captions: Iterable[str], folder: Path) -> Self:
        """With merges learnt from captions."""
        tables = learn_merges(captions, config.vocab_size, folder)
        return cls(tables, TextTokenizerConfig(kind="bpe", on_long=config.on_long))


def train_bpe(
    captions: Iterable[str], vocab_size: int, folder: Path | str, *, on_long: OnLong = "truncate"
) -> BPETokenizer:
    """Learn merges from captions and write the tokenizer to `folder`.

    Args:
        captions: Read once.
        vocab_size: Upper bound on ids, with padding; captions of few words fill less.
        folder: Receives `tokenizer.json` and `config.json`.
        on_long: See `TextTokenizerConfig`.

    Raises:
        ConfigError: When `vocab_size` cannot hold padding and the 256 bytes.
        DataError: When there is no caption.
        StorageError: When the file system refuses.
    """
    tables = learn_merges(captions, vocab_size, Path(folder))
    tokenizer = BPETokenizer(tables, TextTokenizerConfig(kind="bpe", on_long=on_long))
    tokenizer.save(Path(folder))
    write_json(Path(folder) / "config.json", encode(tokenizer.config))
    return tokenizer


def learn_merges(captions: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """The tables of a byte-level BPE; raises as `train_bpe`."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"vocab_size: got {vocab_size}; padding and the 256 bytes need {SMALLEST_VOCABULARY} ids")
    tables = Tokenizer(models.BPE())
    tables.normalizer = normalizers.NFC()
    # The space before a word belongs to it, also before the first: one id per word wherever it stands.
    tables.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tables.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD_TOKENS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counter = _Counted(captions)
    tables.train_from_iterator(counter, trainer)
    if not counter.seen:
        raise DataError(f"{folder}: no captions to train a text tokenizer on; the raw shards have no .txt members")
    return tables


class _Counted:
    def __init__(self, captions: Iterable[str]):
        self.captions, self.seen = iter(captions), 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> str:
        caption = next(self.captions).strip()
        self.seen += 1
        return caption
