"""Texts of people: nothing in them is taken for more than it is."""

import re
import unicodedata

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"})
"""Categories of Unicode: controls, marks of no width, halves of pairs, white space."""


def lines_of(text: str) -> list[str]:
    r"""The lines of a text without the white space around them, blank ones left out.

    Split at line feeds alone. `str.splitlines` also splits at `\x0b`, `\x0c`, `\x1c` to `\x1e`, `\x85`, U+2028 and
    U+2029, which captions hold inside of sentences.
    """
    return [line for line in map(str.strip, text.split("\n")) if line]


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen."""
    return all(unicodedata.category(letter) in _UNSEEN for letter in text)


def slug(text: str) -> str:
    """What may be part of a file's name, for a person to know it by; empty when the text has no letter of ASCII."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
