"""What people come with: class folders, other names, folders of the datasets library, tables with images inside."""

import io
import json
import os

import pytest
from PIL import Image

from tokscale.base.config import decode
from tokscale.base.errors import DataError
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.sources import SourceConfig, described, open_source
from tokscale.data.raw.survey import survey

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def png(grey: int = 0, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(stream, form)
    return stream.getvalue()


def fill(root, *names: str, **texts: str):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def source(kind: str, path, **options):
    return open_source(decode(SourceConfig, {"kind": kind, "path": str(path), **options}), 0)


def samples(opened) -> list:
    found = []
    for index in range(len(opened)):
        try:
            record = opened.record(index)
            found.append((opened.name(index), record.captions or record.caption, record.label))
        except BadSample as error:
            found.append((opened.name(index), f"! {error.reason}", None))
    return found


def test_class_folders_give_labels_names_and_captions_on_request(tmp_path):
    fill(tmp_path, "dog/1.png", "cat/a/2.png", "cat/3.jpg", "4.png")
    opened = source("folder", tmp_path, labels="folder")
    assert opened.classes == ["cat", "dog"]
    assert sorted(samples(opened)) == [
        ("4.png", "! label", None),
        ("cat/3.jpg", "", 0),
        ("cat/a/2.png", "", 0),
        ("dog/1.png", "", 1),
    ]
    opened = source("folder", tmp_path, labels="folder", template="a photo of a {class}")
    assert ("cat/3.jpg", "a photo of a cat", 0) in samples(opened)


def test_images_without_captions_are_taken_on_request(tmp_path):
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "2.txt").write_text("two")
    assert samples(source("folder", tmp_path)) == [("1.png", "! caption_missing", None), ("2.png", "two", None)]
    assert [text for _, text, _ in samples(source("folder", tmp_path, captions="optional"))] == ["", "two"]
    assert [text for _, text, _ in samples(source("folder", tmp_path, captions="none"))] == ["", ""]


def test_names_of_all_kinds(tmp_path):
    fill(tmp_path, "a.png", "b.PNG", "c.jpeg", "d.png", "e.jfif", "deep/er/f.webp")
    (tmp_path / "a.TXT").write_text("upper case")
    (tmp_path / "b.caption").write_text("another ending")
    (tmp_path / "c.json").write_text(json.dumps({"meta": {"text": ["one", "two"]}}))
    (tmp_path / "d.png.txt").write_text("after the ending")
    (tmp_path / "e.txt").write_text("first")
    (tmp_path / "e.caption").write_text("second")
    (tmp_path / "deep/er/f.txt").write_text("deep")
    found = dict((name, text) for name, text, _ in samples(source("folder", tmp_path, caption_field="meta.text")))
    assert found == {
        "a.png": "upper case",
        "b.PNG": "another ending",
        "c.jpeg": ("one", "two"),
        "d.png": "after the ending",
        "e.jfif": "first",
        "deep/er/f.webp": "deep",
    }
    both = source("folder", tmp_path, caption_field="meta.text", all_captions=True)
    assert ("e.jfif", ("first", "second"), None) in samples(both)


def test_a_pattern_says_which_files_are_samples(tmp_path):
    fill(tmp_path, "x/1.input.jpg", "x/1.mask.jpg", "x/2.input.jpg", "thumb.jpg")
    for number in (1, 2):
        (tmp_path / f"x/{number}.prompt.txt").write_text(f"number {number}")
    opened = source("folder", tmp_path, image_pattern="{key}.input.jpg", caption_files=["prompt.txt"])
    assert [(name, text) for name, text, _ in samples(opened)] == [
        ("x/1.input.jpg", "number 1"),
        ("x/2.input.jpg", "number 2"),
    ]


def test_links_are_entered_on_request_and_never_in_a_circle(tmp_path):
    fill(tmp_path / "away", "1.png")
    fill(tmp_path / "here", "2.png")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "away")
    (tmp_path / "here" / "circle").symlink_to(tmp_path / "here")
    options = {"captions": "none"}
    assert [name for name, *_ in samples(source("folder", tmp_path / "here", **options))] == ["2.png"]
    found = samples(source("folder", tmp_path / "here", follow_links=True, **options))
    assert [name for name, *_ in found] == ["2.png", "linked/1.png"]


def test_what_is_no_file_costs_its_sample_and_nothing_hangs(tmp_path):
    fill(tmp_path, "ok.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "ok.txt")
    found = samples(source("folder", tmp_path, captions="none"))
    assert dict((name, text) for name, text, _ in found) == {
        "ok.png": "",
        "pipe.png": "! unreadable",
        "dangling.png": "! unreadable",
    }
    assert ("ok.png", "! unreadable", None) in samples(source("folder", tmp_path))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_an_imagefolder_of_the_datasets_library(tmp_path, ending):
    fill(tmp_path, "train/1.png", "train/2.png")
    rows = [{"file_name": f"train/{n}.png", "text": f"number {n}"} for n in (1, 2)]
    path = tmp_path / f"metadata.{ending}"
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif ending == "csv":
        path.write_text("file_name,text\n" + "\n".join(",".join(row.values()) for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert samples(source("folder", tmp_path)) == [("row 1", "number 1", None), ("row 2", "number 2", None)]


def test_what_describes_a_split_may_lie_in_its_folder(tmp_path):
    fill(tmp_path, "train/1.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "number 1"}')
    assert samples(source("folder", tmp_path)) == [("row 1", "number 1", None)]
    assert survey(tmp_path).captions == ["number 1"]
    fill(tmp_path, "test/1.png")
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "number 1"}')
    for look in (lambda: source("folder", tmp_path), lambda: survey(tmp_path)):
        with pytest.raises(DataError, match=r"holds the splits test, train; name one: source.path=.*/test"):
            look()


@pytest.mark.parametrize("names", [["train-00000-of-00001", "test-00000-of-00001"], ["train/0", "test/0"]])
def test_splits_in_parquet_are_never_mixed_in_silence(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        parquet.write_table(hf_table(0, 2), tmp_path / f"{name}.parquet")
    for kind in ("folder", "parquet"):
        with pytest.raises(DataError, match="holds the splits test, train; give one a folder of its own"):
            source(kind, tmp_path)
    (tmp_path / f"{names[1]}.parquet").unlink()
    assert len(source("folder", tmp_path)) == len(source("parquet", tmp_path)) == 2


def hf_table(start: int, count: int, captions=None):
    rows = [
        {"image": {"bytes": png(n), "path": None}, "text": captions or f"number {n}", "label": n % 2}
        for n in range(start, start + count)
    ]
    about = {"info": {"features": {"label": {"names": ["even", "odd"], "_type": "ClassLabel"}}}}
    return pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(about)})


def test_parquet_with_images_inside_in_parts_and_row_groups(tmp_path):
    for part in range(3):
        parquet.write_table(hf_table(4 * part, 4), tmp_path / f"train-{part}.parquet", row_group_size=3)
    for kind in ("parquet", "folder"):
        opened = source(kind, tmp_path, label_column="label")
        assert opened.classes == ["even", "odd"]
        assert samples(opened) == [(f"row {n + 1}", f"number {n}", n % 2) for n in range(12)]
        assert opened.record(7).image == png(7)


def test_parquet_with_bytes_and_lists_of_captions(tmp_path):
    rows = [{"jpg": png(n, "JPEG"), "caption": [f"a {n}", f"b {n}"]} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert samples(source("parquet", tmp_path / "t.parquet"))[2] == ("row 3", ("a 2", "b 2"), None)
    nulls = [{"jpg": png(1), "caption": None}, {"jpg": None, "caption": "x"}, {"jpg": b"junk", "caption": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(nulls), tmp_path / "n.parquet")
    found = [text for _, text, _ in samples(source("parquet", tmp_path / "n.parquet"))]
    assert found == ["! caption_missing", "! image_missing", "! decode"]


def test_parquet_columns_of_other_types_are_refused_by_name(tmp_path):
    parquet.write_table(pyarrow.table({"path": ["1.png"], "caption": [7]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="'caption' holds int64; captions are texts"):
        source("parquet", tmp_path / "t.parquet")
    parquet.write_table(pyarrow.table({"path": [1.5], "caption": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="'path' holds double; images are paths"):
        source("parquet", tmp_path / "t.parquet")
    for bad in (b"", b"PAR1junkPAR1"):
        (tmp_path / "t.parquet").write_bytes(bad)
        with pytest.raises(DataError, match=r"t\.parquet: not a parquet file"):
            source("parquet", tmp_path / "t.parquet")


def test_what_save_to_disk_wrote(tmp_path):
    table = hf_table(0, 5)
    with pyarrow.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (tmp_path / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_files": None}
    (tmp_path / "state.json").write_text(json.dumps(state))
    for kind in ("folder", "parquet"):
        assert samples(source(kind, tmp_path))[4] == ("row 5", "number 4", None)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match=r"holds the splits train, test; name one: source.path=.*/train"):
        source("folder", tmp_path)


def test_keys_that_came_later_do_not_change_a_fingerprint(tmp_path):
    assert described(decode(SourceConfig, {"kind": "folder", "path": "/a"})) == {"kind": "folder", "path": "/a"}
    values = {"kind": "csv", "path": "/a", "on_bad_row": "drop"}
    assert described(decode(SourceConfig, values)) == {
        "kind": "csv",
        "path": "/a",
        "path_column": "path",
        "caption_column": "caption",
        "delimiter": ",",
        "root": None,
        "on_bad_row": "drop",
    }


@pytest.mark.parametrize("form, ending", [("AVIF", "avif"), ("WEBP", "webp"), ("TIFF", "tif")])
def test_formats_that_pillow_reads(tmp_path, form, ending):
    (tmp_path / f"1.{ending}").write_bytes(png(7, form))
    record = source("folder", tmp_path, captions="none").record(0)
    assert record.ending == ("webp" if form == "WEBP" else "png")
