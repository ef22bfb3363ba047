"""Real pictures without a download: the glyphs of the NotoColorEmoji font, captioned by the Unicode standard."""

import functools
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from tokscale.base.config import Config
from tokscale.base.errors import EnvironmentRefused
from tokscale.base.files import sha256_file
from tokscale.base.shapes import Tensor, UInt8
from tokscale.data.images import encode_picture
from tokscale.data.raw_shards import RawRecord

NATIVE = 109
"""The only size of the font's bitmaps, in pixels per em: another one cannot be loaded."""
SIDE = 136
"""Side of the pictures: the widest glyph."""
HELD_OUT_EVERY = 10
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
# Parts of sequences, not pictures: the enclosing keycap, the letters that make flags, skin tones.
_PARTS = {0x20E3, *range(0x1F1E6, 0x1F200), *range(0x1F3FB, 0x1F400)}


class EmojiConfig(Config):
    """Every glyph that stands for one code point, on white: more than 1,200."""

    kind: Literal["emoji"] = "emoji"
    split: Literal["all", "train", "held_out"] = "train"
    """`held_out` is every tenth glyph, `train` the others."""
    font: Path | None = None
    """NotoColorEmoji.ttf; looked for among the system's fonts when not given."""
    annotations: Path | None = None
    """The Unicode CLDR's annotations in one language: a glyph that has some gets its short name and its keywords as a
    second caption. Debian's unicode-cldr-core has the English ones at
    /usr/share/unicode/cldr/common/annotations/en.xml."""


class EmojiSource:
    """The glyphs as a sequence of samples."""

    def __init__(self, config: EmojiConfig, seed: int):
        """Open the font.

        Raises:
            EnvironmentRefused: When it is not installed, or is another one; or when the annotations cannot be read.
        """
        del seed  # nothing is drawn at random
        self.font, self.annotations = find_font(config.font), config.annotations
        self._words = {} if config.annotations is None else annotations(config.annotations)
        every = code_points(self.font)
        held_out = set(every[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        choice: dict[str, Sequence[int]] = {
            "all": every,
            "held_out": sorted(held_out),
            "train": [c for c in every if c not in held_out],
        }
        self.points = choice[config.split]

    def __len__(self) -> int:
        return len(self.points)

    def identity(self) -> Any:
        """What decides the samples beside the configuration."""
        known = {"font": sha256_file(self.font), "unicode": unicodedata.unidata_version, "size": NATIVE}
        return known if self.annotations is None else known | {"annotations": sha256_file(self.annotations)}

    def record(self, index: int) -> RawRecord:
        """One sample."""
        point = self.points[index]
        picture = encode_picture(render(chr(point), self.font), "png")
        captions = [caption(point), *([self._words[chr(point)]] if chr(point) in self._words else [])]
        return RawRecord(f"{index:09d}", picture, "png", "\n".join(captions), {"code_point": f"U+{point:04X}"})


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
    loaded = _load(font)
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


@functools.cache
def annotations(path: Path) -> Mapping[str, str]:
    """Short name and keywords by character, e.g. `grinning face: face, grin`.

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
    names = {character: text for character, kind, text in entries if character and kind == "tts" and text}
    keywords = {character: text for character, kind, text in entries if character and kind is None and text}
    found = {}
    for character, name in names.items():
        words = [word for word in keywords.get(character, "").split(" | ") if word not in ("", name)]
        if words:
            found[character] = f"{name}: {', '.join(words)}".lower()
    return found


def render(text: str, font: Path) -> UInt8[Tensor, "channels height width"]:
    """One glyph in colour in the middle of a white square of `SIDE` pixels."""
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    loaded = _load(font)
    left, top, right, bottom = loaded.getbbox(text)
    corner = ((SIDE - right - left) / 2, (SIDE - bottom - top) / 2)
    ImageDraw.Draw(canvas).text(corner, text, font=loaded, embedded_color=True)
    return rearrange(torch.from_numpy(np.array(canvas)), "h w c -> c h w")


def _candidates() -> list[Path]:
    folders: Iterable[Path] = (Path(folder).expanduser() for folder in _FOLDERS)
    return sorted(path for folder in folders if folder.is_dir() for path in folder.rglob("NotoColorEmoji*.ttf"))


@functools.cache
def _load(font: Path) -> ImageFont.FreeTypeFont:
    try:
        # Given a path, Pillow would quietly take a system font of the same name when this one is damaged. The basic
        # layout draws one glyph for one code point; raqm, where it is installed, would join sequences.
        data = io.BytesIO(font.read_bytes())
        return ImageFont.truetype(data, NATIVE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise EnvironmentRefused(
            f"{font}: cannot be drawn at {NATIVE} pixels ({error}); the bitmap font NotoColorEmoji.ttf of the Debian "
            "package fonts-noto-color-emoji can"
        ) from None


def _has_glyph(font: ImageFont.FreeTypeFont, text: str) -> bool:
    left, top, right, bottom = font.getbbox(text)
    return right > left and bottom > top
