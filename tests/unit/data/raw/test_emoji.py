import io

import pytest
from PIL import Image, features

from tokscale.base.errors import EnvironmentRefused
from tokscale.data.raw.emoji import (
    SIDE,
    Annotation,
    EmojiConfig,
    EmojiSource,
    annotations,
    caption,
    code_points,
    find_font,
    render,
)

try:
    FONT = find_font()
except EnvironmentRefused:
    FONT = None
needs_font = pytest.mark.skipif(FONT is None, reason="needs the Debian package fonts-noto-color-emoji")
needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="needs the Debian package libfribidi0")


def test_captions_are_the_name_and_the_block():
    assert caption(0x1F600) == "grinning face, emoticons"
    assert caption(0x1F697) == "automobile, transport and map symbols"
    assert caption(0x231A) == "watch, miscellaneous technical"
    assert caption(0x1FAA8) == "rock, symbols and pictographs extended-a"
    assert caption(0xA9) == "copyright sign, latin-1 supplement"


def test_a_missing_font_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("tokscale.data.raw.emoji._FOLDERS", (str(tmp_path), str(tmp_path / "none")))
    with pytest.raises(EnvironmentRefused, match="apt-get install fonts-noto-color-emoji"):
        EmojiSource(EmojiConfig(), seed=0)
    with pytest.raises(EnvironmentRefused, match=r"mine\.ttf was not found"):
        find_font(tmp_path / "mine.ttf")


def test_a_font_is_found_below_the_system_folders(tmp_path, monkeypatch):
    (tmp_path / "truetype" / "noto").mkdir(parents=True)
    (tmp_path / "truetype" / "noto" / "NotoColorEmoji.ttf").write_bytes(b"font")
    monkeypatch.setattr("tokscale.data.raw.emoji._FOLDERS", (str(tmp_path),))
    assert find_font() == tmp_path / "truetype" / "noto" / "NotoColorEmoji.ttf"


def test_another_file_is_refused(tmp_path):
    (tmp_path / "NotoColorEmoji.ttf").write_bytes(b"not a font")
    with pytest.raises(EnvironmentRefused, match="cannot be drawn at 109"):
        code_points(tmp_path / "NotoColorEmoji.ttf")


@needs_font
def test_there_are_enough_images_and_every_tenth_is_held_out():
    sources = {split: EmojiSource(EmojiConfig(split=split), seed=0) for split in ("all", "train", "held_out")}
    texts = {split: set(source.texts) for split, source in sources.items()}
    assert len(texts["train"]) >= 1200
    assert texts["train"] | texts["held_out"] == texts["all"] and not texts["train"] & texts["held_out"]
    assert 0.09 < len(texts["held_out"]) / len(texts["all"]) <= 0.1
    assert len({caption(ord(text)) for text in texts["all"]}) == len(texts["all"])


@needs_font
def test_glyphs_are_in_colour_on_white_and_whole():
    pixels = render("\U0001f600", FONT)
    assert pixels.shape == (3, SIDE, SIDE)
    border = [pixels[:, 0], pixels[:, -1]]
    assert all((edge == 255).all() for edge in border)
    red, _, blue = pixels[:, SIDE // 4, SIDE // 2].tolist()
    assert red > 200 and blue < 150  # a yellow face


@needs_font
def test_records_hold_the_image_its_caption_and_code_point():
    source = EmojiSource(EmojiConfig(), seed=0)
    record = source.record(source.texts.index("\U0001f600"))
    assert record.caption == "grinning face, emoticons" and record.meta == {"code_point": "U+1F600"}
    assert Image.open(io.BytesIO(record.image)).size == (SIDE, SIDE)
    assert record == source.record(source.texts.index("\U0001f600"))


WAVE = "\U0001f44b\U0001f3ff"
ANNOTATIONS = """<?xml version="1.0" encoding="UTF-8" ?>
<ldml><annotations>
  <annotation cp="\U0001f600">face | Grin | grinning face</annotation>
  <annotation cp="\U0001f600" type="tts">grinning face</annotation>
  <annotation cp="\U0001f697" type="tts">car</annotation>
  <annotation cp="\U0001f44b\U0001f3ff">dark skin tone | hand | waving hand: dark skin tone</annotation>
  <annotation cp="\U0001f44b\U0001f3ff" type="tts">waving hand: dark skin tone</annotation>
  <annotation cp="\U0001f600\U0001f697" type="tts">no emoji</annotation>
</annotations></ldml>
"""


def test_annotations_are_short_names_with_keywords(tmp_path):
    path = tmp_path / "en.xml"
    path.write_text(ANNOTATIONS, encoding="utf-8")
    assert annotations(path) == {
        "\U0001f600": Annotation("grinning face", ("face", "grin")),
        "\U0001f697": Annotation("car", ()),
        WAVE: Annotation("waving hand: dark skin tone", ("dark skin tone", "hand")),
        "\U0001f600\U0001f697": Annotation("no emoji", ()),
    }


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
    source = EmojiSource(EmojiConfig(annotations=(path,)), seed=0)
    face, car = (source.record(source.texts.index(text)) for text in "\U0001f600\U0001f697")
    assert face.caption.splitlines() == ["grinning face, emoticons", "grinning face: face, grin"]
    assert car.caption == "automobile, transport and map symbols"
    assert source.identity() != EmojiSource(EmojiConfig(), seed=0).identity()


@needs_font
@needs_raqm
def test_sequences_come_after_the_others_as_far_as_annotations_and_font_have_them(tmp_path):
    path = tmp_path / "en.xml"
    path.write_text(ANNOTATIONS, encoding="utf-8")
    single = EmojiSource(EmojiConfig(split="all"), seed=0)
    source = EmojiSource(EmojiConfig(split="all", annotations=(path,), sequences=True), seed=0)
    assert source.texts == [*single.texts, WAVE]
    record = source.record(len(single))
    assert record.caption.splitlines() == [
        "waving hand: dark skin tone",
        "waving hand: dark skin tone: dark skin tone, hand",
    ]
    assert record.meta == {"code_point": "U+1F44B U+1F3FF"}
    light, dark = (render(text, FONT).float().mean() for text in (WAVE[0], WAVE))
    assert dark < light - 10  # one hand in another colour, not two glyphs


def test_sequences_want_their_names():
    with pytest.raises(ValueError, match="set `annotations` too"):
        EmojiConfig(sequences=True)


@needs_font
def test_sequences_without_the_library_name_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("tokscale.data.raw.emoji.features.check", lambda name: False)
    with pytest.raises(EnvironmentRefused, match="apt-get install libfribidi0"):
        render(WAVE, FONT)
