import io

import pytest
from PIL import Image

from tokscale.base.errors import EnvironmentRefused
from tokscale.data.emoji import SIDE, EmojiConfig, EmojiSource, annotations, caption, code_points, find_font, render

try:
    FONT = find_font()
except EnvironmentRefused:
    FONT = None
needs_font = pytest.mark.skipif(FONT is None, reason="needs the Debian package fonts-noto-color-emoji")


def test_captions_are_the_name_and_the_block():
    assert caption(0x1F600) == "grinning face, emoticons"
    assert caption(0x1F697) == "automobile, transport and map symbols"
    assert caption(0x231A) == "watch, miscellaneous technical"
    assert caption(0x1FAA8) == "rock, symbols and pictographs extended-a"
    assert caption(0xA9) == "copyright sign, latin-1 supplement"


def test_a_missing_font_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("tokscale.data.emoji._FOLDERS", (str(tmp_path), str(tmp_path / "none")))
    with pytest.raises(EnvironmentRefused, match="apt-get install fonts-noto-color-emoji"):
        EmojiSource(EmojiConfig(), seed=0)
    with pytest.raises(EnvironmentRefused, match=r"mine\.ttf was not found"):
        find_font(tmp_path / "mine.ttf")


def test_a_font_is_found_below_the_system_folders(tmp_path, monkeypatch):
    (tmp_path / "truetype" / "noto").mkdir(parents=True)
    (tmp_path / "truetype" / "noto" / "NotoColorEmoji.ttf").write_bytes(b"font")
    monkeypatch.setattr("tokscale.data.emoji._FOLDERS", (str(tmp_path),))
    assert find_font() == tmp_path / "truetype" / "noto" / "NotoColorEmoji.ttf"


def test_another_file_is_refused(tmp_path):
    (tmp_path / "NotoColorEmoji.ttf").write_bytes(b"not a font")
    with pytest.raises(EnvironmentRefused, match="cannot be drawn at 109"):
        code_points(tmp_path / "NotoColorEmoji.ttf")


@needs_font
def test_there_are_enough_pictures_and_every_tenth_is_held_out():
    sources = {split: EmojiSource(EmojiConfig(split=split), seed=0) for split in ("all", "train", "held_out")}
    points = {split: set(source.points) for split, source in sources.items()}
    assert len(points["train"]) >= 1200
    assert points["train"] | points["held_out"] == points["all"] and not points["train"] & points["held_out"]
    assert 0.09 < len(points["held_out"]) / len(points["all"]) <= 0.1
    assert len({caption(point) for point in points["all"]}) == len(points["all"])


@needs_font
def test_glyphs_are_in_colour_on_white_and_whole():
    pixels = render("\U0001f600", FONT)
    assert pixels.shape == (3, SIDE, SIDE)
    border = [pixels[:, 0], pixels[:, -1]]
    assert all((edge == 255).all() for edge in border)
    red, _, blue = pixels[:, SIDE // 4, SIDE // 2].tolist()
    assert red > 200 and blue < 150  # a yellow face


@needs_font
def test_records_hold_the_picture_its_caption_and_code_point():
    source = EmojiSource(EmojiConfig(), seed=0)
    record = source.record(source.points.index(0x1F600))
    assert record.caption == "grinning face, emoticons" and record.meta == {"code_point": "U+1F600"}
    assert Image.open(io.BytesIO(record.picture)).size == (SIDE, SIDE)
    assert record == source.record(source.points.index(0x1F600))


ANNOTATIONS = """<?xml version="1.0" encoding="UTF-8" ?>
<ldml><annotations>
  <annotation cp="\U0001f600">face | Grin | grinning face</annotation>
  <annotation cp="\U0001f600" type="tts">grinning face</annotation>
  <annotation cp="\U0001f697" type="tts">car</annotation>
</annotations></ldml>
"""


def test_annotations_are_short_names_with_keywords(tmp_path):
    path = tmp_path / "en.xml"
    path.write_text(ANNOTATIONS, encoding="utf-8")
    assert annotations(path) == {"\U0001f600": "grinning face: face, grin"}


def test_annotations_that_cannot_be_read_name_the_package(tmp_path):
    with pytest.raises(EnvironmentRefused, match="apt-get install unicode-cldr-core"):
        annotations(tmp_path / "none.xml")
    (tmp_path / "odd.xml").write_text("no xml")
    with pytest.raises(EnvironmentRefused, match=r"odd\.xml"):
        annotations(tmp_path / "odd.xml")


@needs_font
def test_annotations_are_a_second_caption(tmp_path):
    path = tmp_path / "en.xml"
    path.write_text(ANNOTATIONS, encoding="utf-8")
    source = EmojiSource(EmojiConfig(annotations=path), seed=0)
    face, car = (source.record(source.points.index(point)) for point in (0x1F600, 0x1F697))
    assert face.caption.splitlines() == ["grinning face, emoticons", "grinning face: face, grin"]
    assert car.caption == "automobile, transport and map symbols"
    assert source.identity() != EmojiSource(EmojiConfig(), seed=0).identity()
