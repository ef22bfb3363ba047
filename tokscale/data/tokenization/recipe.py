"""What makes token shards of raw ones, once its parts are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.data.blocks import BLOCK_VERSION
from tokscale.data.manifest import StreamRecord, TextRecord
from tokscale.data.tokenization.config import FilterConfig, TextConfig, TransformConfig, VariantConfig

VERSION = 1
"""Raised when equal settings give other shards than before."""


@dataclass(frozen=True)
class Recipe:
    """What makes token shards of raw ones: all of it is in the fingerprint."""

    raw: Path
    tokenizers: Mapping[str, ImageTokenizer]
    """By stream, `codes` first."""
    text_tokenizer: TextTokenizer | None
    """Set when caption ids are stored."""
    transform: TransformConfig
    variants: VariantConfig
    filters: FilterConfig
    text: TextConfig
    scores: tuple[str, ...]
    encode_batch: int
    """Pictures in a batch, variants counted."""
    block_size: int
    labels: bool = False
    """Whether class labels are stored."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the bytes of token shards, JSON-ready, by names that a person recognises."""
        stored = None
        if self.text_tokenizer is not None:
            stored = TextRecord(
                tokenizer=self.text_tokenizer.fingerprint,
                num_tokens=self.text_tokenizer.num_tokens,
                length=self.text.length,
            )
        return {
            "version": VERSION,
            "block_version": BLOCK_VERSION,
            "block_size": self.block_size,
            "tokenizers": {
                name: StreamRecord.of(tokenizer).model_dump(mode="json") for name, tokenizer in self.tokenizers.items()
            },
            "encode_batch": self.encode_batch,
            "transform": self.transform.model_dump(mode="json"),
            "variants": self.variants.model_dump(mode="json") | {"count": self.variants.count},
            "filters": self.filters.model_dump(mode="json"),
            "split_lines": self.text.split_lines,
            "text": stored.model_dump(mode="json") if stored else None,
            "scores": list(self.scores),
            **({"labels": True} if self.labels else {}),  # absent, not false: older folders keep their fingerprints
        }
