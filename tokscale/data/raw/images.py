"""Bytes of an image file to pixels, whatever the file holds: always 8-bit RGB, or a reason why not.

JPEG goes through simplejpeg where it is installed, everything else (and every JPEG that simplejpeg refuses, CMYK above
all) through Pillow; resizing is torch's antialiased bicubic kernel on uint8, which is Pillow's to within one grey level
and several times as fast. Safe to call from many threads; all of it releases the interpreter lock.

Pillow makes an image of many a damaged file, grey where the data end or noise where they are not what was written. So
what a format can tell is asked first: of JPEG the warnings of libjpeg, of PNG the checksums and the end mark, of GIF
what follows the image. WebP, BMP and uncompressed TIFF have nothing of the kind.
"""

import importlib
import io
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tokscale.base.shapes import Tensor, UInt8
from tokscale.data.raw.bad_samples import BadSample, Reason

try:
    import simplejpeg
except ImportError:  # an installation without the `train` extra decodes with Pillow alone
    simplejpeg = None


def _plugins() -> tuple[str, ...]:
    """Formats of further packages, where they are installed: JPEG XL and HEIC (`pip install 'tokscale[formats]'`)."""
    found = []
    with suppress(ImportError):
        importlib.import_module("pillow_jxl")  # registers itself
        found.append("JXL")
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
        found.append("HEIF")
    return tuple(found)


MAX_PIXELS = 64 * 2**20
"""Larger images are refused before they are decompressed."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", *_plugins())
"""What is decoded. Pillow knows formats (EPS, for one) that run other programs; a data set has no need of them."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_GIF = (b"GIF87a", b"GIF89a")
_HOLLOW_BYTES, _HOLLOW_SHARE = 64, 0.25
"""Zero bytes at the end, and their share: encoders leave up to a tenth where an image is of one colour."""
_ORIENTATION = 0x0112
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def decode_image(
    data: bytes,
    *,
    orient: bool = False,
    max_pixels: int = MAX_PIXELS,
    on_corrupt: Callable[[str], None] | None = None,
) -> UInt8[Tensor, "channels height width"]:
    """Decode an image file to RGB.

    Transparency is laid on white, 16-bit grey scaled to 8, of an animation the first frame taken. The file's content
    counts, not its name.

    Args:
        data: The file's bytes.
        orient: Turn the image as its EXIF orientation says. Off by default: img2dataset's shards and most published
            data sets ignore it.
        max_pixels: The most that are decoded.
        on_corrupt: Called with what is wrong with a damaged file of which there still is an image, which is then
            returned; without it such a file is refused.

    Returns:
        3 channels, in channels-last memory.

    Raises:
        BadSample: With reason `empty`, `decode`, `truncated`, `corrupt`, `bomb` or `mode`.
    """
    if not data:
        raise BadSample("empty", "zero bytes")
    array, wrong = None, None
    if data.startswith(_JPEG):
        array, wrong = _decode_jpeg(data, max_pixels)
    elif data.startswith(_PNG):
        wrong = _png_damage(data)
    elif data.startswith(_GIF):
        wrong = _gif_damage(data)
    elif (data.startswith(b"RIFF") and data[8:12] == b"WEBP") or data[4:12] == b"ftypavif":
        wrong = _hollow(data)
    if array is None or orient:
        array = _decode_any(data, orient, max_pixels)
    if wrong is not None:
        if on_corrupt is None:
            raise BadSample("corrupt", wrong)
        on_corrupt(wrong)
    return rearrange(torch.from_numpy(array), "h w c -> c h w")


def resize(
    pixels: UInt8[Tensor, "channels height width"], size: tuple[int, int]
) -> UInt8[Tensor, "channels rows columns"]:
    """Scale to `(rows, columns)`, antialiased bicubic, aspect not kept."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]


def centre_square(pixels: UInt8[Tensor, "channels height width"], side: int) -> UInt8[Tensor, "channels side side"]:
    """The largest central square, scaled to `side` pixels."""
    height, width = pixels.shape[1:]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    return resize(pixels[:, top : top + square, left : left + square], (side, side))


def encode_image(pixels: UInt8[Tensor, "channels height width"], ending: Literal["png", "jpg"]) -> bytes:
    """The file of an RGB image: PNG is exact, JPEG has quality 95 and full colour resolution."""
    buffer = io.BytesIO()
    image = Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())
    if ending == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def with_channels(pixels: UInt8[Tensor, "rgb height width"], channels: int) -> UInt8[Tensor, "channels height width"]:
    """RGB as grey (ITU-R 601 luma) or with an opaque alpha channel."""
    if channels == 1:
        luma = pixels.float().mul(pixels.new_tensor([299, 587, 114], dtype=torch.float32)[:, None, None]).sum(0) / 1000
        return luma.round().to(torch.uint8)[None]
    if channels == 4:
        return torch.cat([pixels, torch.full_like(pixels[:1], 255)])
    return pixels


def _decode_jpeg(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8] | None, str | None]:
    """Pixels through simplejpeg, None where Pillow must look at it; and what is damaged, None where nothing is."""
    if simplejpeg is None:
        return None, None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(int(width), int(height), max_pixels)
        if space in ("CMYK", "YCCK"):  # Pillow knows how such colours are meant; here they are only looked through
            simplejpeg.decode_jpeg(data, "CMYK", strict=True)
            return None, None
        return simplejpeg.decode_jpeg(data, "RGB", strict=True), None
    except ValueError as error:
        return None, str(error)


def _png_damage(data: bytes) -> str | None:
    """What is wrong with a PNG's critical chunks: Pillow does not compare the checksums of pixels."""
    at = len(_PNG)
    while at + 12 <= len(data):
        size, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 8 + size
        if end + 4 > len(data):
            break
        stated = int.from_bytes(data[end : end + 4])
        if name[:1].isupper() and zlib.crc32(data[at + 4 : end]) != stated:
            return f"the checksum of the chunk {name.decode('latin-1')!a} at byte {at} is wrong"
        if name == b"IEND":
            return None
        at = end + 4
    return f"no end mark: the file ends inside of a chunk, or before one, at byte {at}"


def _gif_damage(data: bytes) -> str | None:
    """Whether the first image of a GIF ends where it should: nothing else in the file tells."""
    try:
        at = 13 + _palette_bytes(data[10])
        while data[at] == 0x21:  # an extension, of which there may be many before the image
            at = _after_blocks(data, at + 2)
        if data[at] != 0x2C:
            return f"no image where one should begin, at byte {at}"
        at = _after_blocks(data, at + 11 + _palette_bytes(data[at + 9]))
        if data[at] not in (0x21, 0x2C, 0x3B):
            return f"neither a block nor the end mark after the first image, at byte {at}"
    except IndexError:
        return "no end mark: the file ends inside of its first image, or right after it"
    return None


def _hollow(data: bytes) -> str | None:
    """Whether the end of a WEBP or AVIF was lost to zeros: their arithmetic decoders take any bytes for an image."""
    pixels = data
    if data[12:16] in (b"VP8 ", b"VP8L"):  # without what may follow the pixels
        pixels = data[20 : 20 + int.from_bytes(data[16:20], "little")]
    zeros = len(pixels) - len(pixels.rstrip(b"\0"))
    if zeros >= _HOLLOW_BYTES and zeros >= _HOLLOW_SHARE * len(pixels):
        return f"its last {zeros} of {len(pixels)} bytes are zero: its end was lost"
    return None


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    while data[at]:
        at += 1 + data[at]
    return at + 1


def _decode_any(data: bytes, orient: bool, max_pixels: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.width, image.height, max_pixels)
            image.load()
            array = _rgb(image)
            return _turned(array, image.getexif().get(_ORIENTATION, 1)) if orient else array
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("bomb", str(error)) from None
    except UnidentifiedImageError:
        raise BadSample("decode", f"not an image that is read here ({', '.join(FORMATS)})") from None
    except Exception as error:  # on damaged bytes decoders raise almost anything: SyntaxError, struct.error, ...
        reason: Reason = "truncated" if "truncated" in str(error).lower() else "decode"
        raise BadSample(reason, f"{type(error).__name__}: {error}") from None


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise BadSample("bomb", f"{width} x {height} pixels, more than {most}")


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        return _from_deep_grey(image)
    if image.mode == "F":
        raise BadSample("mode", "32-bit float pixels have no agreed range")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        # As img2dataset does. Dropping the alpha channel instead gives black fringes.
        rgba = image.convert("RGBA")
        matte = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(matte, rgba)
    return np.array(image.convert("RGB"))


def _from_deep_grey(image: Image.Image) -> NDArray[np.uint8]:
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise BadSample("mode", f"grey values from {grey.min()} to {grey.max()}; at most 16 bits are understood")
    return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def _turned(array: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo the camera's rotation, EXIF values 1 to 8."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
