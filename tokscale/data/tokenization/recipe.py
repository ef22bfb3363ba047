"""What makes token shards of raw ones, once its parts are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.data.raw.places import RawPlace
from tokscale.data.tokenization.buckets import choose_bucket
from tokscale.data.tokenization.config import FilterConfig, TextConfig, TransformConfig, VariantConfig
from tokscale.data.tokens.blocks import BLOCK_VERSION
from tokscale.data.tokens.manifest import CODES, StreamRecord, TextRecord

VERSION = 1
"""Raised when equal settings give other shards than before."""


@dataclass(frozen=True)
class Recipe:
    """What makes token shards of raw ones: all of it is in the fingerprint."""

    raw: RawPlace
    tokenizers: Mapping[str, ImageTokenizer]
    """Of square images, by stream, `codes` first."""
    text_tokenizer: TextTokenizer | None
    """Set when caption ids are stored."""
    transform: TransformConfig
    variants: VariantConfig
    filters: FilterConfig
    text: TextConfig
    scores: tuple[str, ...]
    encode_batch: int
    """Images in a batch, variants counted."""
    block_size: int
    labels: bool = False
    """Whether class labels are stored."""
    caption_tokenizer: TextTokenizer | None = None
    """Counts the tokens of captions for `filters.max_tokens`."""
    buckets: Mapping[str, Mapping[str, ImageTokenizer]] = field(default_factory=dict)
    """Aspect buckets: by name the tokenizers of their images, by stream. None takes the square of every image."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the data sets that come of it, each a folder: those of the buckets, or one without a name."""
        return tuple(self.buckets) or ("",)

    def of(self, part: str) -> "Recipe":
        """What makes one part, whatever the shape of its images."""
        return replace(self, tokenizers=self.buckets[part], buckets={}) if self.buckets else self

    def part_of(self, width: int, height: int) -> str:
        """Where an image belongs."""
        sizes = {name: streams[CODES].image_hw for name, streams in self.buckets.items()}
        return choose_bucket(width, height, sizes) if sizes else ""

    @property
    def _caption_member(self) -> list[str | None] | None:
        return None if (self.text.member, self.text.field) == ("txt", None) else [self.text.member, self.text.field]

    @property
    def _caption_tokens(self) -> dict[str, Any]:
        counted = self.caption_tokenizer
        return {"most": self.filters.max_tokens, "tokenizer": counted.fingerprint} if counted is not None else {}

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
        # A list, since of two buckets that fit an image equally the first takes it.
        buckets = [{"name": name, "tokenizers": _described(streams)} for name, streams in self.buckets.items()]
        return {
            "version": VERSION,
            "block_version": BLOCK_VERSION,
            "block_size": self.block_size,
            "tokenizers": _described(self.tokenizers),
            "encode_batch": self.encode_batch,
            "transform": self.transform.model_dump(mode="json", exclude={"keep_corrupt", "member"}),
            "variants": self.variants.model_dump(mode="json") | {"count": self.variants.count},
            "filters": self.filters.model_dump(mode="json", exclude={"least", "most", "max_tokens"}),
            "split_lines": self.text.split_lines,
            "text": stored.model_dump(mode="json") if stored else None,
            "scores": list(self.scores),
            # What was added later is absent where it is not used: older folders keep their fingerprints.
            **({"labels": True} if self.labels else {}),
            **_given("members", {"image": self.transform.member, "caption": self._caption_member}),
            **_given("quality", {"least": self.filters.least or None, "most": self.filters.most or None}),
            **_given("caption_tokens", self._caption_tokens),
            **({"keep_corrupt": True} if self.transform.keep_corrupt else {}),
            **({"buckets": buckets} if buckets else {}),
        }


def _given(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in values.items() if value is not None}
    return {name: given} if given else {}


def _described(tokenizers: Mapping[str, ImageTokenizer]) -> dict[str, Any]:
    return {name: StreamRecord.of(tokenizer).model_dump(mode="json") for name, tokenizer in tokenizers.items()}
