"""The files that hold an image's captions, to texts."""

import json
from typing import Any

from tokscale.data.raw.bad_samples import BadSample

CAPTIONS = "captions.json"
"""Ending of the list of a sample's captions, where it has several."""


def checked_caption(data: bytes) -> str:
    """A caption file's text, without the white space around it.

    Raises:
        BadSample: When it is blank or not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("caption_encoding", str(error)) from None
    if not text:
        raise BadSample("caption_empty", f"{len(data)} bytes of white space")
    return text


def captions_in_json(data: bytes, field: str) -> tuple[str, ...]:
    """Captions of a JSON file: a text or a list of texts under `field`, with dots between names.

    Raises:
        BadSample: When there is none, or it is anything else.
    """
    try:
        value: Any = json.loads(data)
    except ValueError as error:
        raise BadSample("caption_encoding", str(error)) from None
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in texts):
        raise BadSample("caption_type", f"{field}: {value!r:.60}; captions are texts")
    captions = tuple(text.strip() for text in texts if text and text.strip())
    if not captions:
        raise BadSample("caption_missing", f"nothing under {field}")
    return captions


def listed_captions(data: bytes) -> tuple[str, ...]:
    """The captions that `prepare` listed.

    Raises:
        BadSample: When it is no list of texts, or an empty one.
    """
    try:
        listed = json.loads(data)
    except ValueError as error:
        raise BadSample("caption_encoding", f"{CAPTIONS}: {error}") from None
    if not isinstance(listed, list) or not all(isinstance(caption, str) for caption in listed):
        raise BadSample("caption_encoding", f"{CAPTIONS}: not a list of texts")
    captions = tuple(caption.strip() for caption in listed if caption.strip())
    if not captions:
        raise BadSample("caption_empty", f"{CAPTIONS}: no text in it")
    return captions
