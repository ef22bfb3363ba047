import io
from pathlib import Path

import pytest
from PIL import Image

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.images import decode_image
from tokscale.data.raw.shapes import caption, render, sample_scene
from tokscale.data.raw.sources import SourceConfig, open_source


def image(colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, kind)
    return buffer.getvalue()


def source(**values):
    return open_source(decode(SourceConfig, values), seed=0)


def outcomes(opened) -> list[str]:
    found = []
    for index in range(len(opened)):
        try:
            found.append(opened.record(index).caption)
        except BadSample as error:
            found.append(f"! {error.reason}")
    return found


def fill(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_a_folder_pairs_images_with_same_stem_captions_in_a_fixed_order(tmp_path):
    fill(tmp_path, {"b.png": image(), "b.txt": "bee\n", "a.JPG": image(kind="JPEG"), "a.txt": "ay", "notes.md": ""})
    opened = source(kind="folder", path=tmp_path)
    assert outcomes(opened) == ["ay", "bee"]
    record = opened.record(0)
    assert (record.key, record.ending, record.meta) == ("000000000", "jpg", {"path": "a.JPG"})
    assert record.image == (tmp_path / "a.JPG").read_bytes()


def test_images_of_one_name_in_two_folders_are_two_samples(tmp_path):
    # The original's data set keys by the file's stem alone, so that one of them is lost.
    fill(tmp_path, {"x/1.png": image(), "x/1.txt": "first", "y/1.png": image("blue"), "y/1.txt": "second"})
    assert outcomes(source(kind="folder", path=tmp_path)) == ["first", "second"]


def test_unusable_files_of_a_folder_have_a_reason(tmp_path):
    fill(
        tmp_path,
        {
            "a.png": image(), "a.txt": " \n", "b.png": image(), "b.txt": b"caf\xe9", "c.png": image(),
            "d.png": b"", "d.txt": "d", "e.jpg": image(kind="JPEG")[:80], "e.txt": "e", "f.txt": "alone",
            "g.png": b"<html>", "g.txt": "g", "._h.png": b"junk of an archiver",
        },
    )  # fmt: skip
    assert outcomes(source(kind="folder", path=tmp_path)) == [
        "! caption_empty", "! caption_encoding", "! caption_missing", "! empty", "! truncated", "! decode",
        "! image_missing",
    ]  # fmt: skip


def test_wrong_endings_are_corrected_and_other_formats_become_png(tmp_path):
    files = {"a.png": image(kind="JPEG"), "b.gif": image("blue", "GIF"), "c.jpg": image(kind="WEBP")}
    fill(tmp_path, files | {f"{stem}.txt": stem for stem in "abc"})
    opened = source(kind="folder", path=tmp_path)
    assert [opened.record(index).ending for index in range(3)] == ["jpg", "png", "webp"]
    assert decode_image(opened.record(1).image)[:, 0, 0].tolist() == [0, 0, 255]


def test_a_changed_folder_is_another_identity(tmp_path):
    fill(tmp_path, {"a.png": image(), "a.txt": "a"})
    before = source(kind="folder", path=tmp_path).identity()
    assert source(kind="folder", path=tmp_path).identity() == before
    fill(tmp_path, {"a.txt": "longer"})
    assert source(kind="folder", path=tmp_path).identity() != before


def test_an_empty_or_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no images found"):
        source(kind="folder", path=tmp_path)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        source(kind="folder", path=tmp_path / "nowhere")


def test_a_csv_of_paths_and_captions(tmp_path):
    fill(
        tmp_path,
        {"p/1.png": image(), "t/list.csv": '\ufeffid,file,text\n1,../p/1.png,"one, two"\n2,no.png,x\n3,,y\n'},
    )
    opened = source(kind="csv", path=tmp_path / "t/list.csv", path_column="file", caption_column="text")
    assert outcomes(opened) == ["one, two", "! unreadable", "! image_missing"]
    rooted = source(
        kind="csv", path=tmp_path / "t/list.csv", path_column="file", caption_column="text", root=tmp_path / "p"
    )
    assert outcomes(rooted)[0] == "one, two"


def test_tables_with_other_delimiters_short_rows_and_absolute_paths(tmp_path):
    fill(tmp_path, {"1.png": image(), "list.tsv": f"path\tcaption\n{tmp_path}/1.png\tone\n1.png\n"})
    opened = source(kind="csv", path=tmp_path / "list.tsv", delimiter="tab", on_bad_row="drop")
    assert outcomes(opened) == ["one", "! bad_row"]


def test_a_wrong_column_is_answered_with_the_nearest(tmp_path):
    fill(tmp_path, {"list.csv": "path,captoin\na.png,x\n"})
    with pytest.raises(DataError, match=r"no column 'caption' \(source.caption_column\); did you mean 'captoin'\?"):
        source(kind="csv", path=tmp_path / "list.csv")


def test_a_damaged_or_missing_table_is_named(tmp_path):
    fill(tmp_path, {"bad.csv": b"path,caption\n\xff\xfe,x\n", "bad.parquet": b"PAR1 not really"})
    with pytest.raises(DataError, match="row 1 is not text in utf-8"):
        source(kind="csv", path=tmp_path / "bad.csv")
    with pytest.raises(DataError, match="not a parquet file"):
        source(kind="parquet", path=tmp_path / "bad.parquet")
    for kind in ("csv", "parquet"):
        with pytest.raises(DataError, match="no such table"):
            source(kind=kind, path=tmp_path / "none")


def test_a_parquet_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    fill(tmp_path, {"1.png": image()})
    table = pyarrow.table({"path": ["1.png", "1.png", None], "caption": ["one", None, "three"], "more": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "list.parquet")
    opened = source(kind="parquet", path=tmp_path / "list.parquet")
    assert outcomes(opened) == ["one", "! caption_missing", "! image_missing"]
    with pytest.raises(DataError, match=r"source\.path_column"):
        source(kind="parquet", path=tmp_path / "list.parquet", path_column="paths")


def test_shapes_are_drawn_from_the_seed():
    values = {"kind": "shapes", "count": 10, "split": "held_out"}
    opened = open_source(decode(SourceConfig, values), seed=7)
    record, scene = opened.record(3), sample_scene(7, 3, "held_out")
    assert len(opened) == 10 and record.caption == caption(scene)
    assert (decode_image(record.image) == render(scene)).all()
    jpeg = open_source(decode(SourceConfig, values | {"format": "jpg", "image_size": 64}), seed=7).record(3)
    assert jpeg.ending == "jpg" and decode_image(jpeg.image).shape == (3, 64, 64)


def test_an_unknown_kind_or_key_is_explained():
    with pytest.raises(ConfigError, match="did you mean 'shapes'"):
        decode(SourceConfig, {"kind": "shape"}, where="source")
    with pytest.raises(ConfigError, match="image_sise"):
        decode(SourceConfig, {"kind": "shapes", "image_sise": 64}, where="source")


def test_hidden_files_and_folders_are_no_data(tmp_path):
    for name in ("a", ".hidden", "._a", ".ipynb_checkpoints/a-checkpoint", "__MACOSX/a", "deep/.git/b", "deep/c"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.with_suffix(".txt").write_text("x")
    (tmp_path / ".png").write_bytes(b"")
    opened = source(kind="folder", path=str(tmp_path))
    assert sorted(opened.name(index) for index in range(len(opened))) == ["a.png", "deep/c.png"]
