"""Why a sample cannot be used, in words that are counted, listed and compared between runs."""

from typing import Literal

from tokscale.base.errors import DataError

Reason = Literal[
    "empty",
    "decode",
    "truncated",
    "corrupt",
    "bomb",
    "mode",
    "image_missing",
    "caption_missing",
    "caption_empty",
    "caption_encoding",
    "key_encoding",
    "duplicate_key",
    "unreadable",
    "too_small",
    "aspect",
    "caption_length",
    "label",
    "quality",
    "bad_row",
    "caption_type",
    "image_type",
]
"""
| reason | meaning |
|---|---|
| `empty` | the image has no bytes |
| `decode` | not an image, or damaged |
| `truncated` | the image ends early |
| `corrupt` | damaged, though a lenient decoder makes some image of it; kept where `keep_corrupt` is set |
| `bomb` | more pixels than allowed |
| `mode` | a kind of pixel with no agreed meaning as RGB, such as 32-bit float |
| `image_missing` | nothing with the ending of an image |
| `caption_missing` | no caption at all |
| `caption_empty` | captions of white space or control characters alone |
| `caption_encoding` | a caption that is not UTF-8 |
| `key_encoding` | a name that is not UTF-8 |
| `duplicate_key` | a key that the same shard had before |
| `unreadable` | a file that is not there or may not be read |
| `too_small` | a side below the filter's least |
| `aspect` | longer than wide, or wider than long, beyond the filter |
| `caption_length` | no caption within the filter's bounds |
| `quality` | a score in the JSON beyond the filter, or missing |
| `bad_row` | a row that does not have the fields of its table |
| `caption_type` | a caption that is no text |
| `image_type` | an image that is neither a path nor a file's bytes |
| `label` | no class label, or one that is not a whole number from 0 on |
"""


class BadSample(DataError):  # noqa: N818 - reads as what was found
    """One sample that cannot be used. Whoever reads samples counts it, lists it and goes on."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail
