"""Bad samples of every kind go through one tokenization: used where they can be, else listed with the right reason."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from tokenizing import encoded, image, make_recipe, tokenize

from tokscale.data.tokenization import inputs
from tokscale.data.tokenization.config import FilterConfig, TransformConfig
from tokscale.data.tokenization.units import finished
from tokscale.data.tokenization.verify import verify_unit
from tokscale.data.tokens.manifest import TokenDataset

GREY = np.full((8, 8), 100, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.stack([GREY] * 3, -1), "JPEG", quality=95, exif=exif.tobytes())


def animated() -> bytes:
    stream = io.BytesIO()
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (100, 0, 0)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def transparent(mode: str) -> bytes:
    image = Image.new("RGBA", (8, 8), (10, 10, 10, 0)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def palette() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(GREY).convert("P").save(stream, "PNG")
    return stream.getvalue()


# What is used, with the code that it must give.
GOOD = {
    "plain": ({"png": image(100), "txt": b"a caption"}, 100),
    "jpeg": ({"jpg": image(100, form="JPEG", quality=95), "txt": b"a caption"}, 100),
    "webp": ({"webp": image(100, form="WEBP", lossless=True), "txt": b"a caption"}, 100),
    "cmyk": (
        {"jpg": encoded(np.full((8, 8, 4), 155, np.uint8), "JPEG", "CMYK", quality=95), "txt": b"a caption"},
        None,
    ),
    "grey": ({"png": encoded(GREY), "txt": b"a caption"}, 100),
    "rgba": ({"png": transparent("RGBA"), "txt": b"a caption"}, 255),  # laid on white, not black
    "grey-alpha": ({"png": transparent("LA"), "txt": b"a caption"}, 255),
    "palette": ({"png": palette(), "txt": b"a caption"}, 100),
    "16-bit": ({"png": encoded(np.full((8, 8), 100 * 257, np.uint16)), "txt": b"a caption"}, 100),
    "exif": ({"jpg": rotated(), "txt": b"a caption"}, 100),
    "animated": ({"gif": animated(), "txt": b"a caption"}, 100),
    "wrong-extension": ({"jpg": image(100), "txt": b"a caption"}, 100),
    "bom": ({"png": image(100), "txt": b"\xef\xbb\xbfa caption"}, 100),
    "upper-case": ({"PNG": image(100), "TXT": b"a caption"}, 100),
}
# What is left out, and why.
BAD = {
    "truncated-jpeg": ({"jpg": encoded(NOISE, "JPEG", quality=95)[:2000], "txt": b"x"}, "truncated"),
    "truncated-png": ({"png": encoded(NOISE)[:2000], "txt": b"x"}, "truncated"),
    "zero-bytes": ({"png": b"", "txt": b"x"}, "empty"),
    "html": ({"jpg": b"<html>404</html>", "txt": b"x"}, "decode"),
    "bomb": ({"png": encoded(np.zeros((200, 200), np.uint8)), "txt": b"x"}, "bomb"),
    "no-image": ({"txt": b"x"}, "image_missing"),
    "no-caption": ({"png": image(1)}, "caption_missing"),
    "empty-caption": ({"png": image(1), "txt": b""}, "caption_empty"),
    "blank-caption": ({"png": image(1), "txt": b" \n\t\n"}, "caption_empty"),
    "latin-1": ({"png": image(1), "txt": "größer".encode("latin-1")}, "caption_encoding"),
}


def write_poison(path, repeated: str = "plain") -> int:
    """A shard of all of these, and one key twice; returns the number of samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [(key, files) for key, (files, _) in {**GOOD, **BAD}.items()]
    samples.append((repeated, {"png": image(7), "txt": b"a second one"}))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples:
            for ending, data in files.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return len(samples)


@pytest.fixture
def poisoned(tmp_path):
    count = write_poison(tmp_path / "raw" / "00000.tar")
    recipe = make_recipe(tmp_path / "raw", transform=TransformConfig(max_pixels=10_000))
    plan, _ = tokenize(tmp_path / "tokens", recipe, work={"max_drop_fraction": 1.0})
    return tmp_path, plan, count


def test_what_can_be_used_gives_the_right_codes(poisoned):
    folder, _, _ = poisoned
    block = TokenDataset(folder / "tokens").read(0)
    codes = dict(zip(block.keys(np.arange(len(block))), block.tensors["codes"], strict=True))
    assert list(codes) == list(GOOD)
    for key, (_, expected) in GOOD.items():
        if expected is not None:
            assert np.abs(codes[key].astype(int) - expected).max() <= 1, key
    assert all(block.captions(row) == ["a caption"] for row in range(len(block)))


def test_what_cannot_is_counted_and_listed_with_its_reason(poisoned):
    folder, plan, count = poisoned
    (record,) = finished(folder / "tokens", plan)
    reasons = [reason for _, reason in BAD.values()] + ["duplicate_key"]
    assert record.drops == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    assert record.samples_in == count == record.shard.samples + sum(record.drops.values())
    listed = [json.loads(line) for line in (folder / "tokens/quarantine/000000.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["reason"]) for entry in listed] == [
        *((key, reason) for key, (_, reason) in BAD.items()),
        ("plain", "duplicate_key"),
    ]
    with tarfile.open(folder / "raw/00000.tar") as tar:
        offsets = {member.name.partition(".")[0]: member.offset for member in reversed(tar.getmembers())}
    assert all(entry["offset"] == offsets[entry["key"]] for entry in listed[:-1])
    assert all(entry["input"] == "00000.tar" and entry["detail"] for entry in listed)
    assert verify_unit(folder / "tokens", plan, plan.units[0]) == []


def test_images_without_captions_can_be_wanted(tmp_path):
    write_poison(tmp_path / "raw" / "00000.tar")
    recipe = make_recipe(tmp_path / "raw", filters=FilterConfig(min_caption=0))
    tokenize(tmp_path / "tokens", recipe, work={"max_drop_fraction": 1.0})
    dataset = TokenDataset(tmp_path / "tokens")
    captions = {}
    for number in range(len(dataset.sizes)):
        block = dataset.read(number)
        captions |= {key: block.captions(row) for row, key in enumerate(block.keys(np.arange(len(block))))}
    assert captions["no-caption"] == captions["empty-caption"] == captions["blank-caption"] == []
    assert captions["plain"] == ["a caption"] and dataset.manifest.drops["caption_encoding"] == 1


def test_a_decoder_that_fails_in_an_unknown_way_costs_one_sample(tmp_path, monkeypatch):
    decode = inputs.decode_image

    def fragile(data, **options):
        pixels = decode(data, **options)
        if int(pixels[0, 0, 0]) == 255:
            raise RuntimeError("a kernel that cannot")
        return pixels

    monkeypatch.setattr(inputs, "decode_image", fragile)
    write_poison(tmp_path / "raw" / "00000.tar")
    recipe = make_recipe(tmp_path / "raw")
    tokenize(tmp_path / "tokens", recipe, work={"max_drop_fraction": 1.0})
    listed = (tmp_path / "tokens/quarantine/000000.jsonl").read_text()
    assert '"detail": "RuntimeError: a kernel that cannot"' in listed and '"key": "rgba"' in listed
