"""Sheets for people: no caption, however long or strange, sizes one."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from tokscale.inference import grids
from tokscale.inference.grids import labelled_grid

PIXELS = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
TALLEST = 2 * (128 + 4 * 11 + 6) + 6
HOSTILE = {
    "two megabytes of words": "a red ring " * 190_000,
    "two megabytes without a space": "x" * 2_000_000,
    "line feeds": "a\n" * 10_000,
    "wide letters": "\u4e00\u53ea\u732b" * 5_000,
    "letters without width": "e\u0301" * 50_000,
    "control characters": "\x00\x07\x1b[31m\x85\u2028" * 500,
    "half a surrogate": "\ud800 ring",
    "right to left": "\u202e\u05d0\u05d1" * 1000,
}


@pytest.mark.parametrize("label", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_caption_sizes_a_sheet(label):
    tracemalloc.start()
    sheet = labelled_grid(PIXELS, [label, "b", "c", "d"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sheet.width == 2 * (128 + 6) + 6 and sheet.height <= TALLEST
    assert peak < 64 * 2**20


def test_a_label_is_cut_after_four_lines_and_says_so():
    font = grids.ImageFont.load_default(size=10)
    lines = grids._wrapped("a small red circle above a large green square " * 9, 128, font)
    assert len(lines) == 4 and lines[-1].endswith("\u2026") and lines[0] == "a small red circle"
    assert grids._wrapped("a small red circle", 128, font) == ["a small red circle"]
    assert all(font.getlength(line) <= 128 for line in grids._wrapped("\u4e00\u53ea" * 80, 128, font))


def test_text_does_not_run_into_the_next_image():
    white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    alone = labelled_grid(white, ["", "x"], columns=2)
    beside = labelled_grid(white, ["\u4e00" * 400 + "W" * 400, "x"], columns=2)
    right = (6 + 128 + 6, 0, alone.width, alone.height)
    assert list(beside.crop(right).getdata()) == list(alone.crop(right).getdata())


def test_very_many_images_have_a_bounded_sheet(monkeypatch):
    monkeypatch.setattr(grids, "_MOST_PIXELS", 200_000)
    sheet = labelled_grid(torch.zeros(100, 3, 8, 8, dtype=torch.uint8), ["a"] * 100)
    assert sheet.width * sheet.height <= 200_000 + 2 * 6 * (sheet.width + sheet.height)


def test_images_of_several_groups_stand_beside_their_own():
    first, second = (torch.arange(start, start + 3, dtype=torch.uint8).view(3, 1, 1, 1) for start in (0, 10))
    assert grids.interleave(first, second).flatten().tolist() == [0, 10, 1, 11, 2, 12]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_of_every_number_of_channels_are_written_as_they_are(channels, mode, tmp_path):
    pixels = torch.arange(channels * 6, dtype=torch.uint8).view(channels, 2, 3) + 100
    grids.save_png(pixels, tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        assert (image.mode, image.size) == (mode, (3, 2))
        assert torch.equal(torch.from_numpy(np.array(image)).view(2, 3, channels).permute(2, 0, 1), pixels)


def test_a_grey_image_is_grey_on_a_sheet():
    sheet = labelled_grid(torch.full((1, 1, 8, 8), 77, dtype=torch.uint8), ["grey"])
    assert sheet.getpixel((6 + 64, 6 + 64)) == (77, 77, 77)
