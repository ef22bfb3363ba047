import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tokscale.base.rng import generator
from tokscale.data.raw import images
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.images import centre_square, decode_image, resize


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth and not symmetric, so that neither JPEG nor a flip leaves it as it is."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 / width, y * 255 / height, (x + 2 * y) * 255 / (width + 2 * height)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def decoded(data: bytes, **options) -> np.ndarray:
    return decode_image(data, **options).permute(1, 2, 0).numpy()


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(BadSample) as caught:
        decode_image(data, **options)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(kind):
    np.testing.assert_array_equal(decoded(file_of(photo(), kind)), np.asarray(photo()))


def test_both_jpeg_decoders_agree(monkeypatch):
    data = file_of(photo(), "JPEG", quality=90)
    fast = decoded(data)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.abs(fast.astype(int) - decoded(data)).max() <= 1
    assert np.abs(fast.astype(int) - np.asarray(photo())).mean() < 4


def test_webp_is_read():
    assert np.abs(decoded(file_of(photo(), "WEBP", quality=95)).astype(int) - np.asarray(photo())).mean() < 6


def test_a_jpeg_in_cmyk_has_the_colours_it_was_made_of():
    red = Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")
    assert np.abs(decoded(file_of(red, "JPEG")).astype(int) - (200, 30, 30)).max() < 12


def test_grey_becomes_three_equal_channels():
    for kind in ("PNG", "JPEG"):
        pixels = decoded(file_of(photo().convert("L"), kind))
        assert pixels.shape == (32, 48, 3) and (pixels == pixels[..., :1]).all()


def test_one_bit_images_are_black_and_white():
    assert set(np.unique(decoded(file_of(photo().convert("1"))))) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white_not_on_black(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 8))
    file = file_of(image.convert(mode))
    pixels = decoded(file)
    assert (pixels[:, 5:] == 255).all() and np.abs(pixels[:, :4].astype(int) - 10).max() <= 1


def test_half_transparent_is_mixed_with_white():
    assert abs(int(decoded(file_of(Image.new("RGBA", (4, 4), (0, 100, 200, 128))))[0, 0, 1]) - 177) <= 1


def test_a_palette_without_transparency_keeps_its_colours():
    palette = photo().convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
    np.testing.assert_array_equal(decoded(file_of(palette)), np.asarray(palette.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped():
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert decoded(file_of(Image.fromarray(deep)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_deeper_pixels_are_refused():
    assert reason_of(file_of(Image.fromarray(np.array([[70000]], np.int32)), "TIFF")) == "mode"
    assert reason_of(file_of(Image.fromarray(np.array([[0.5]], np.float32)), "TIFF")) == "mode"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed_where_asked(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(photo(), "JPEG", exif=exif, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decoded(data, orient=True), expected)
    assert decoded(data).shape == (32, 48, 3)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"save_all": True, "append_images": frames[1:]} | ({"lossless": True} if kind == "WEBP" else {})
        assert decoded(file_of(frames[0], kind, **options))[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_files_have_a_reason(kind):
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = file_of(noisy, kind)
    reasons = {reason_of(data[: int(len(data) * share)]) for share in (0.02, 0.5, 0.9)}
    assert reasons <= {"truncated", "decode"}
    if kind in ("JPEG", "PNG"):
        assert "truncated" in reasons


def test_what_is_not_an_image_has_a_reason():
    assert reason_of(b"") == "empty"
    assert reason_of(b"<html>404</html>") == "decode"
    assert reason_of(b"\xff\xd8\xff" + b"junk" * 50) in ("decode", "truncated")
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "decode"


def test_every_single_bit_flip_is_read_or_refused_never_a_crash():
    data = file_of(photo(12, 9), "PNG")
    for position in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        try:
            assert decoded(bytes(damaged)).shape[2] == 3
        except BadSample as error:
            assert error.reason in ("decode", "truncated", "corrupt", "mode", "bomb")


def test_a_bomb_is_refused_before_it_is_decompressed(monkeypatch):
    for kind in ("PNG", "JPEG"):
        assert reason_of(file_of(photo(), kind), max_pixels=48 * 32 - 1) == "bomb"
        decode_image(file_of(photo(), kind), max_pixels=48 * 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit speaks the same words
    assert reason_of(file_of(photo(), "PNG")) == "bomb"


def test_the_content_counts_and_not_the_name():
    assert decoded(file_of(photo(), "GIF")).shape == (32, 48, 3)  # no name is ever asked for


def test_resizing_agrees_with_pillow_within_one_grey_level():
    noise = torch.randint(0, 256, (3, 96, 80), dtype=torch.uint8, generator=generator(0, "resize"))
    expected = Image.fromarray(noise.permute(1, 2, 0).numpy()).resize((32, 40), Image.Resampling.BICUBIC)
    ours = resize(noise, (40, 32)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - np.asarray(expected)).max() <= 1


def test_resizing_to_the_same_size_changes_nothing():
    pixels = decode_image(file_of(photo()))
    assert resize(pixels, (32, 48)) is pixels


def test_the_centre_square_is_the_centre():
    wide = torch.zeros(3, 20, 60, dtype=torch.uint8)
    wide[:, :, 20:40] = 200
    assert (centre_square(wide, 10) == 200).all()
    assert (centre_square(wide.transpose(1, 2), 10) == 200).all()
    assert centre_square(wide, 20).shape == (3, 20, 20)


def _noise(form: str, **options) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 4 if options.pop("cmyk", False) else 3), dtype=np.uint8)
    Image.fromarray(pixels, "CMYK" if pixels.shape[2] == 4 else "RGB").save(stream, form, **options)
    return stream.getvalue()


FILES = {
    "jpeg": _noise("JPEG", quality=90),
    "progressive": _noise("JPEG", quality=90, progressive=True),
    "cmyk": _noise("JPEG", cmyk=True),
    "png": _noise("PNG"),
    "gif": _noise("GIF"),
    "webp": _noise("WEBP", lossless=True),
    "lossy webp": _noise("WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0" + bytes(500)),
    "avif": _noise("AVIF"),
    "tiff": _noise("TIFF", compression="tiff_lzw"),
    "bmp": _noise("BMP"),
}
UNSEEN = {"webp": 0.6, "lossy webp": 0.55, "avif": 0.7, "bmp": 0.0}
"""Formats without any checksum, whose zeros are an image like another: from where in the file on. Encoders end in zeros
themselves, so few of them say nothing."""


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("how", ["cut", "zeroed"])
@pytest.mark.parametrize("orient", [False, True])
def test_no_damaged_file_passes_for_an_image(form, how, orient):
    data = FILES[form]
    decode_image(data, orient=orient)
    for at in sorted({len(data) * tenths // 20 for tenths in range(1, 20)} | {len(data) - 30, len(data) - 3}):
        damaged = data[:at] + (b"" if how == "cut" else b"\0" * (len(data) - at))
        if how == "zeroed" and at >= UNSEEN.get(form, 1.0) * len(data):
            continue
        if how == "cut" and form == "lossy webp" and at >= len(data) - 520:
            continue  # of what was noted about the image, not of the image
        with pytest.raises(BadSample) as caught:
            decode_image(damaged, orient=orient)
        assert caught.value.reason in ("truncated", "corrupt", "decode"), at


@pytest.mark.parametrize("form", ["jpeg", "cmyk", "png"])
def test_a_damaged_image_is_kept_on_request_and_said(form):
    data, at = FILES[form], len(FILES[form]) // 2
    damaged = data[:at] + b"\0" * (len(data) - at) if form != "png" else data[:-12]
    with pytest.raises(BadSample, match=r"^corrupt: ."):
        decode_image(damaged)
    said: list[str] = []
    kept = decode_image(damaged, on_corrupt=said.append)
    assert len(said) == 1 and said[0] and kept.shape == (3, 64, 64)
    assert decode_image(data, on_corrupt=said.append).equal(kept) == (form == "png") and len(said) == 1


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("form", ["WEBP", "AVIF"])
def test_an_image_of_one_colour_may_end_in_zeros(form, lossless):
    for colour in ("black", "red"):
        options = {"lossless": lossless, "method": 0} if form == "WEBP" else {}
        assert decoded(file_of(Image.new("RGB", (1500, 700), colour), form, **options)).shape == (700, 1500, 3)


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP"])
def test_what_follows_a_whole_image_is_no_damage(form):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, form)
    assert decode_image(stream.getvalue() + b"and more").shape == (3, 4, 4)
