"""Texts of people: nothing in them is taken for more than it is."""


def lines_of(text: str) -> list[str]:
    r"""The lines of a text without the white space around them, blank ones left out.

    Split at line feeds alone. `str.splitlines` also splits at `\x0b`, `\x0c`, `\x1c` to `\x1e`, `\x85`, U+2028 and
    U+2029, which captions hold inside of sentences.
    """
    return [line for line in map(str.strip, text.split("\n")) if line]
