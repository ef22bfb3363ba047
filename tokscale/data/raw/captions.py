"""The files and values that hold an image's captions, to texts.

A caption of nothing that can be seen (white space, control characters, marks of no width) is no caption, wherever it
stands: it is left out where there are others, and a sample that has none but such ones is `caption_empty`.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokscale.base.text import is_blank
from tokscale.data.raw.bad_samples import BadSample

CAPTIONS = "captions.json"
"""Ending of the list of a sample's captions, where it has several."""


def caption_text(data: bytes) -> str:
    """A caption file's text, without the white space around it; empty when it is blank.

    Raises:
        BadSample: When it is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("caption_encoding", str(error)) from None
    return "" if is_blank(text) else text


def checked_caption(data: bytes) -> str:
    """As `caption_text`.

    Raises:
        BadSample: When it is blank or not UTF-8.
    """
    return written_captions([caption_text(data)], f"{len(data)} bytes")[0]


def texts_of(value: Any, where: str) -> tuple[str, ...]:
    """Captions in a cell or a JSON value: a text, a list of texts, or none. Blank ones are empty.

    Raises:
        BadSample: When it is anything else, or no UTF-8.
    """
    match value:
        case None:
            return ()
        case str():
            return (caption_text(value.encode(errors="surrogatepass")),)
        case bytes():
            return (caption_text(value),)
        case list() | tuple():
            if any(isinstance(part, list | tuple) for part in value):
                raise BadSample("caption_type", f"{where}: a list inside of a list")
            return tuple(text for part in value for text in texts_of(part, where))
        case _:
            raise BadSample("caption_type", f"{where}: {type(value).__name__} {value!r:.40}; captions are texts")


def written_captions(texts: Sequence[str], where: str) -> tuple[str, ...]:
    """Those of a sample's captions that are not blank.

    Raises:
        BadSample: When all are, or there is none.
    """
    written = tuple(text for text in texts if text)
    if not written and texts:
        raise BadSample("caption_empty", f"{where}: white space or control characters alone")
    if not written:
        raise BadSample("caption_missing", f"nothing to {where}")
    return written


def captions_in_json(data: bytes, field: str) -> tuple[str, ...]:
    """Captions of a JSON file: a text or a list of texts under `field`, with dots between names.

    Raises:
        BadSample: When there is none, or it is anything else.
    """
    return written_captions(json_captions(data, field), field)


def json_captions(data: bytes, field: str, where: str = "") -> tuple[str, ...]:
    """As `captions_in_json`, with blank ones as empty texts; none where there is nothing under the field."""
    try:
        value: Any = json.loads(data)  # NaN and its like stand in the files of others
    except (ValueError, RecursionError) as error:
        raise BadSample("caption_encoding", f"{where or field}: {error}") from None
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return texts_of(value, f"{where}: {field}" if where else field)


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
    return written_captions(texts_of(listed, CAPTIONS) or ("",), CAPTIONS)
