"""Real images without a download: the glyphs of the NotoColorEmoji font, captioned by the Unicode standard."""

import functools
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, features
from pydantic import model_validator

from tokscale.base.config import Config, PathKey
from tokscale.base.errors import EnvironmentRefused
from tokscale.base.files import sha256_file
from tokscale.base.shapes import Tensor, UInt8
from tokscale.data.raw.images import encode_image
from tokscale.data.raw.shards import RawRecord

NATIVE = 109
"""The only size of the font's bitmaps, in pixels per em: another one cannot be loaded."""
SIDE = 136
"""Side of the images: the width of every glyph."""
HELD_OUT_EVERY = 10
SEQUENCES_HELD_OUT_EVERY = 11
"""Five skin tones follow each other, so that every tenth sequence would nearly always have the same one."""
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts")
_BLOCKS = (
    # First code point and name of the code charts' blocks in which emoji stand.
    (0x0080, "Latin-1 Supplement"),
    (0x2000, "General Punctuation"),
    (0x2100, "Letterlike Symbols"),
    (0x2190, "Arrows"),
    (0x2300, "Miscellaneous Technical"),
    (0x2460, "Enclosed Alphanumerics"),
    (0x25A0, "Geometric Shapes"),
    (0x2600, "Miscellaneous Symbols"),
    (0x2700, "Dingbats"),
    (0x2900, "Supplemental Arrows-B"),
    (0x2B00, "Miscellaneous Symbols and Arrows"),
    (0x3000, "CJK Symbols and Punctuation"),
    (0x3200, "Enclosed CJK Letters and Months"),
    (0x1F000, "Mahjong Tiles"),
    (0x1F0A0, "Playing Cards"),
    (0x1F100, "Enclosed Alphanumeric Supplement"),
    (0x1F200, "Enclosed Ideographic Supplement"),
    (0x1F300, "Miscellaneous Symbols and Pictographs"),
    (0x1F600, "Emoticons"),
    (0x1F680, "Transport and Map Symbols"),
    (0x1F780, "Geometric Shapes Extended"),
    (0x1F900, "Supplemental Symbols and Pictographs"),
    (0x1FA70, "Symbols and Pictographs Extended-A"),
)
_LAST = 0x1FAFF
# Parts of sequences, not images: the enclosing keycap, the letters that make flags, skin tones.
_PARTS = {0x20E3, *range(0x1F1E6, 0x1F200), *range(0x1F3FB, 0x1F400)}


class EmojiConfig(Config):
    """Every glyph that stands for one code point, on white: more than 1,200; with `sequences` more than 3,000."""

    kind: Literal["emoji"] = "emoji"
    split: Literal["all", "train", "held_out"] = "train"
    """`held_out` is every tenth glyph of one code point and every eleventh of a sequence, `train` the others."""
    font: PathKey | None = None
    """NotoColorEmoji.ttf; looked for among the system's fonts when not given."""
    annotations: tuple[PathKey, ...] = ()
    """Files of the Unicode CLDR's annotations in one language: a glyph that has some gets its short name and its
    keywords as a second caption. Debian's unicode-cldr-core has the English ones, as
    /usr/share/unicode/cldr/common/annotations/en.xml and, for sequences, .../annotationsDerived/en.xml."""
    sequences: bool = False
    """The glyphs of sequences of code points that the annotations name come after the others: skin tones,
    professions, flags."""

    @model_validator(mode="after")
    def _sequences_have_names(self) -> "EmojiConfig":
        if self.sequences and not self.annotations:
            raise ValueError("sequences: drawn as far as the annotations name them; set `annotations` too")
        return self


class EmojiSource:
    """The glyphs as a sequence of samples."""

    classes: Sequence[str] | None = None
    has_captions = True

    def __init__(self, config: EmojiConfig, seed: int):
        """Open the font.

        Raises:
            EnvironmentRefused: When it is not installed, or is another one; when the annotations cannot be read; or
                when sequences are asked for and cannot be drawn.
        """
        del seed  # nothing is drawn at random
        self.font = find_font(config.font)
        self._files = config.annotations
        self._words = {text: words for path in config.annotations for text, words in annotations(path).items()}
        singles = [chr(point) for point in code_points(self.font)]
        named = self._words if config.sequences else ()
        sequences = [text for text in named if len(text) > 1 and has_sequence(self.font, text)]
        held_out = dict.fromkeys(singles[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        held_out |= dict.fromkeys(sequences[SEQUENCES_HELD_OUT_EVERY - 1 :: SEQUENCES_HELD_OUT_EVERY])
        every = [*singles, *sequences]
        choice: dict[str, Sequence[str]] = {
            "all": every,
            "held_out": list(held_out),
            "train": [text for text in every if text not in held_out],
        }
        self.texts = choice[config.split]

    def __len__(self) -> int:
        return len(self.texts)

    def identity(self) -> Any:
        """What decides the samples beside the configuration."""
        known = {"font": sha256_file(self.font), "unicode": unicodedata.unidata_version, "size": NATIVE}
        return known | ({"annotations": [sha256_file(path) for path in self._files]} if self._files else {})

    def name(self, index: int) -> str:
        """Its key."""
        return f"{index:09d}"

    def record(self, index: int) -> RawRecord:
        """One sample."""
        text = self.texts[index]
        image = encode_image(render(text, self.font), "png")
        words = self._words.get(text)
        captions = [words.name if words and len(text) > 1 else caption(ord(text))]
        if words and words.keywords:
            captions.append(f"{words.name}: {', '.join(words.keywords)}")
        points = " ".join(f"U+{ord(character):04X}" for character in text)
        return RawRecord(f"{index:09d}", image, "png", "\n".join(captions), {"code_point": points}, captions)


def find_font(path: Path | None = None) -> Path:
    """The font file.

    Raises:
        EnvironmentRefused: When it is not there, with the package to install.
    """
    found = [path] if path else _candidates()
    for candidate in found:
        if candidate.is_file():
            return candidate
    raise EnvironmentRefused(
        f"the emoji font {path or 'NotoColorEmoji.ttf'} was not found: install the Debian package "
        "fonts-noto-color-emoji (apt-get install fonts-noto-color-emoji), or set source.font to the file"
    )


@functools.cache
def code_points(font: Path) -> tuple[int, ...]:
    """All code points with a name of their own and a glyph in the font, in order.

    Raises:
        EnvironmentRefused: When the font has no colour bitmaps of the expected size.
    """
    loaded = _load(font, ImageFont.Layout.BASIC)
    named = (
        point for point in range(_BLOCKS[0][0], _LAST + 1) if unicodedata.name(chr(point), "") and point not in _PARTS
    )
    points = tuple(point for point in named if _has_glyph(loaded, chr(point)))
    if not points:
        raise EnvironmentRefused(f"{font}: holds no emoji; NotoColorEmoji.ttf does (package fonts-noto-color-emoji)")
    return points


def caption(point: int) -> str:
    """The character's name and its block, e.g. `grinning face, emoticons`."""
    block = next(name for first, name in reversed(_BLOCKS) if first <= point)
    return f"{unicodedata.name(chr(point))}, {block}".lower()


class Annotation(NamedTuple):
    """What the CLDR says of one emoji, in lower case: `grinning face`, `(face, grin)`."""

    name: str
    keywords: tuple[str, ...]
    """Without the name itself."""


@functools.cache
def annotations(path: Path) -> Mapping[str, Annotation]:
    """Short name and keywords by the code points they are of, in the order of the file.

    Raises:
        EnvironmentRefused: When the file is not there or is no such file, with the package that has it.
    """
    try:
        entries = [
            (entry.get("cp"), entry.get("type"), entry.text) for entry in ElementTree.parse(path).iter("annotation")
        ]
    except (OSError, ElementTree.ParseError) as error:
        raise EnvironmentRefused(
            f"source.annotations: cannot read {path} as annotations of the Unicode CLDR ({error}); Debian's package "
            "unicode-cldr-core has them (apt-get install unicode-cldr-core)"
        ) from None
    names = {text: name.lower() for text, kind, name in entries if text and kind == "tts" and name}
    keywords = {text: words.lower().split(" | ") for text, kind, words in entries if text and kind is None and words}
    return {
        text: Annotation(name, tuple(word for word in keywords.get(text, ()) if word not in ("", name)))
        for text, name in names.items()
    }


def has_sequence(font: Path, text: str) -> bool:
    """Whether the font joins a sequence of code points into one glyph.

    Raises:
        EnvironmentRefused: When the library that lays out sequences is not there.
    """
    left, top, right, bottom = _load(font, _layout(text)).getbbox(text)
    return 0 < right - left <= SIDE and bottom > top


def render(text: str, font: Path) -> UInt8[Tensor, "channels height width"]:
    """One glyph in colour in the middle of a white square of `SIDE` pixels.

    Raises:
        EnvironmentRefused: For a sequence of code points, when the library that lays out sequences is not there.
    """
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    loaded = _load(font, _layout(text))
    left, top, right, bottom = loaded.getbbox(text)
    corner = ((SIDE - right - left) / 2, (SIDE - bottom - top) / 2)
    ImageDraw.Draw(canvas).text(corner, text, font=loaded, embedded_color=True)
    return rearrange(torch.from_numpy(np.array(canvas)), "h w c -> c h w")


def _candidates() -> list[Path]:
    folders: Iterable[Path] = (Path(folder).expanduser() for folder in _FOLDERS)
    return sorted(path for folder in folders if folder.is_dir() for path in folder.rglob("NotoColorEmoji*.ttf"))


def _layout(text: str) -> ImageFont.Layout:
    # The basic layout draws one glyph for one code point, raqm joins sequences; where it is missing Pillow would fall
    # back to the other one without a word.
    if len(text) == 1:
        return ImageFont.Layout.BASIC
    if not features.check("raqm"):
        raise EnvironmentRefused(
            "source.sequences: this Pillow cannot lay out sequences of code points; it needs the library fribidi "
            "(apt-get install libfribidi0) and, where it was not built with it, raqm (apt-get install libraqm0)"
        )
    return ImageFont.Layout.RAQM


@functools.cache
def _load(font: Path, layout: ImageFont.Layout) -> ImageFont.FreeTypeFont:
    try:
        # Given a path, Pillow would quietly take a system font of the same name when this one is damaged.
        return ImageFont.truetype(io.BytesIO(font.read_bytes()), NATIVE, layout_engine=layout)
    except OSError as error:
        raise EnvironmentRefused(
            f"{font}: cannot be drawn at {NATIVE} pixels ({error}); the bitmap font NotoColorEmoji.ttf of the Debian "
            "package fonts-noto-color-emoji can"
        ) from None


def _has_glyph(font: ImageFont.FreeTypeFont, text: str) -> bool:
    left, top, right, bottom = font.getbbox(text)
    return right > left and bottom > top
