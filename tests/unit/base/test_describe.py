"""Help lists every key with type, default and meaning, and every alternative of a union once."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tokscale.base.config import Config
from tokscale.base.describe import describe


class Cat(Config):
    """Purrs.

    At length.
    """

    kind: Literal["cat"] = "cat"
    whiskers: int = 4
    """Counted on one side."""


class Dog(Config):
    """Barks."""

    kind: Literal["dog"] = "dog"
    friend: Annotated["Cat | Dog | None", Field(discriminator="kind")] = None
    """Another animal."""


class Home(Config):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    """Who lives here."""
    door: Literal["open", "shut"] = "open"
    rooms: tuple[int, ...] = (2, 3)
    address: Path | None = None
    heated: bool = False
    names: dict[str, float] = {}


def test_every_key_has_its_line():
    lines = describe(Home).splitlines()
    assert lines[:2] == ["  pet: cat (keys below) | dog (keys below), required", "      Who lives here."]
    assert "  door: open | shut = open" in lines
    assert "  rooms: list[integer, ...] = [2, 3]" in lines
    assert "  address: path | null" in lines
    assert "  heated: true | false = false" in lines
    assert "  names: dict[text, number] = {}" in lines


def test_alternatives_are_listed_with_what_makes_them():
    lines = describe(Home).splitlines()
    assert "      with kind=cat: Purrs." in lines and "      with kind=dog: Barks." in lines
    assert "        whiskers: integer = 4" in lines and "            Counted on one side." in lines
    assert not any("kind: " in line for line in lines)


def test_a_class_inside_itself_is_listed_once():
    assert sum("friend: " in line for line in describe(Home).splitlines()) == 1


def test_long_meanings_are_wrapped():
    class Wordy(Config):
        key: int = 0
        """One meaning that goes on and on and on and on and on and on and on and on and on and on and on and on an."""

    lines = describe(Wordy).splitlines()
    assert len(lines) == 3 and all(len(line) <= 110 for line in lines)
