"""A caption of which nothing can be seen is no caption, wherever it stands."""

import io
import json
import tarfile

import pytest
from PIL import Image

from tokscale.base.config import decode
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.captions import captions_in_json, listed_captions, texts_of, written_captions
from tokscale.data.raw.shards import RawShard
from tokscale.data.raw.sources import SourceConfig, open_source

UNSEEN = {
    "nothing": "",
    "white space": " \n\t\u00a0\u3000",
    "one NUL": "\0",
    "controls": "\x07\x1b\x7f\x85",
    "no width": "\u200b\ufeff\u2060",
    "separators": "\u2028\u2029",
}
FORMS = ("text file", "JSON file", "JSON lines", "CSV", "parquet", "several columns", "tar", "JSON in a tar")


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def captions(folder, form: str, caption: str) -> tuple[str, ...]:
    """What is read of a picture with this caption in this form."""
    (folder / "0.png").write_bytes(png())
    if "tar" in form:
        return _in_tar(folder, form, caption)
    kind, name, options = "folder", "", {}
    match form:
        case "text file":
            (folder / "0.txt").write_text(caption)
        case "JSON file":
            (folder / "0.json").write_text(json.dumps({"caption": caption}))
        case "JSON lines":
            kind, name = "jsonl", "list.jsonl"
            (folder / name).write_text(json.dumps({"path": "0.png", "caption": caption}))
        case "CSV":
            kind, name = "csv", "list.csv"
            (folder / name).write_bytes(f'path,caption\n0.png,"{caption}"\n'.encode())
        case _:
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            kind, name = "parquet", "list.parquet"
            columns = {"path": ["0.png"], "caption": [caption], "more": ["seen"]}
            parquet.write_table(pyarrow.table(columns), folder / name)
            options = {"caption_column": ["caption", "more"]} if form == "several columns" else {}
    values = {"kind": kind, "path": str(folder / name), **options}
    record = open_source(decode(SourceConfig, values), 0).record(0)
    return record.captions or (record.caption,)


def _in_tar(folder, form: str, caption: str) -> tuple[str, ...]:
    ending, field = ("txt", None) if form == "tar" else ("json", "caption")
    text = caption if field is None else json.dumps({"caption": caption, "similarity": float("nan")})
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in (("0.png", png()), (f"0.{ending}", text.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with RawShard(folder / "0.tar") as shard:
        return shard.captions(shard.samples[0], member=ending, field=field)


@pytest.mark.parametrize("form", FORMS)
def test_a_caption_that_cannot_be_seen_is_empty_in_every_form(tmp_path, form):
    for unseen in UNSEEN.values():
        if form == "CSV" and "\0" in unseen:
            continue  # such a row is none of its table, which is said first
        if form == "several columns":
            assert captions(tmp_path, form, unseen) == ("seen",)
            continue
        with pytest.raises(BadSample) as caught:
            captions(tmp_path, form, unseen)
        assert caught.value.reason == "caption_empty", repr(unseen)
    assert captions(tmp_path, form, "\u200bein Löwe 🦁")[0] == "\u200bein Löwe 🦁", "what is seen is kept as it is"


def test_blank_captions_are_left_out_beside_others_and_a_lone_one_is_told_from_none():
    assert captions_in_json(b'{"a": {"b": ["", "\\u0000", "one", null, " two "]}}', "a.b") == ("one", "two")
    assert listed_captions(b'["\\u0007", "one"]') == ("one",)
    for value, reason in ((["", "\0"], "caption_empty"), ([], "caption_missing"), ([None], "caption_missing")):
        with pytest.raises(BadSample) as caught:
            written_captions(texts_of(value, "x"), "x")
        assert caught.value.reason == reason
    for bad in (b'{"caption": "\\ud800"}', b"[" * 100_000, b"\xff"):
        with pytest.raises(BadSample) as caught:
            captions_in_json(bad, "caption")
        assert caught.value.reason == "caption_encoding"


def test_a_line_that_cannot_be_seen_is_no_caption_of_its_own(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("0.png", png()), ("0.txt", b"one\n\0\n\x07\ntwo")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with RawShard(tmp_path / "0.tar") as shard:
        assert shard.captions(shard.samples[0], split_lines=True) == ("one", "two")
