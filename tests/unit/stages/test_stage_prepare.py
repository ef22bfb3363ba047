import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError, StorageError
from tokscale.base.files import sha256_file
from tokscale.data.raw.shapes import caption, sample_scene
from tokscale.data.raw.shards import RawDataset, RawShard, read_raw_manifest
from tokscale.dist.env import detect
from tokscale.stages.prepare import PrepareConfig, run


def prepare(folder, count=30, **values):
    source = values.pop("source", {"kind": "shapes", "count": count})
    values = {"data_dir": folder, "source": source, "shard_samples": 10, "threads": 2, "preview": 0} | values
    return run(decode(PrepareConfig, values), detect())


def hashes(folder) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted((folder / "raw").iterdir())}


def test_the_shards_hold_the_source_in_order(tmp_path):
    result = prepare(tmp_path, count=25, seed=4)
    dataset = RawDataset(tmp_path / "raw")
    assert len(dataset) == 25 and [path.name for path in dataset.paths] == ["00000.tar", "00001.tar", "00002.tar"]
    for index in (0, 9, 10, 24):
        shard, sample = dataset.sample(index)
        assert sample.key == f"{index:09d}" and shard.caption(sample) == caption(sample_scene(4, index))
    assert "25 images in 3 shards" in result.summary and result.metrics["samples"] == 25
    assert result.next_command.startswith("tokscale train-tokenizer")


def test_the_manifest_states_counts_and_hashes(tmp_path):
    prepare(tmp_path, count=25)
    manifest = read_raw_manifest(tmp_path / "raw")
    assert manifest.samples == 25 and [shard.samples for shard in manifest.shards] == [10, 10, 5]
    for shard in manifest.shards:
        path = tmp_path / "raw" / shard.file
        assert (path.stat().st_size, sha256_file(path)) == (shard.bytes, shard.sha256)
    stats = json.loads((tmp_path / "raw" / "00002_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (5, 5, {"success": 5})


def test_two_runs_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        prepare(tmp_path / name, threads=3 if name == "b" else 1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_second_run_touches_nothing(tmp_path):
    prepare(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "raw").iterdir()}
    assert prepare(tmp_path).skipped
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "raw").iterdir()} == before


def test_missing_or_cut_shards_are_made_again_and_whole_ones_kept(tmp_path):
    prepare(tmp_path)
    before = hashes(tmp_path)
    (tmp_path / "raw" / "00001.tar").unlink()
    (tmp_path / "raw" / "00002.tar").write_bytes(b"cut")
    kept = (tmp_path / "raw" / "00000.tar").stat().st_mtime_ns
    assert not prepare(tmp_path).skipped
    assert hashes(tmp_path) == before and (tmp_path / "raw" / "00000.tar").stat().st_mtime_ns == kept


def test_a_killed_run_goes_on_where_it_stood(tmp_path):
    prepare(tmp_path / "whole", count=300)
    program = """
import os, signal, sys
from pathlib import Path
from tokscale.data.raw import writer as raw_writer
from tokscale.data.raw.shapes.source import ShapesConfig
from tokscale.dist.env import detect
from tokscale.stages.prepare import PrepareConfig, run
write = raw_writer.write_json
def killed_after_three(path, value):
    write(path, value)
    if path.name == "00002_stats.json":
        os.kill(os.getpid(), signal.SIGKILL)
raw_writer.write_json = killed_after_three
source = ShapesConfig(count=300)
run(PrepareConfig(data_dir=Path(sys.argv[1]), source=source, shard_samples=10, preview=0, threads=2), detect())
"""
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "killed")])
    raw = tmp_path / "killed" / "raw"
    first = (raw / "00000.tar").stat().st_mtime_ns
    assert killed.returncode == -signal.SIGKILL and not (raw / "manifest.json").exists()
    prepare(tmp_path / "killed", count=300)
    assert (raw / "00000.tar").stat().st_mtime_ns == first
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "00000.tar").write_bytes(b"someone's work")
    with pytest.raises(DataError, match=r"raw holds 00000\.tar, which prepare did not write"):
        prepare(tmp_path)
    assert [path.read_bytes() for path in (tmp_path / "raw").iterdir()] == [b"someone's work"]


def test_a_folder_of_other_settings_is_refused_with_the_difference(tmp_path):
    prepare(tmp_path, count=30)
    before = hashes(tmp_path)
    with pytest.raises(DataError, match=r"raw holds another data set \(count=30 there, 40 now\)"):
        prepare(tmp_path, count=40)
    for changed in ({"seed": 1}, {"shard_samples": 5}):
        with pytest.raises(DataError, match="with another seed, shard_samples or content"):
            prepare(tmp_path, **changed)
    assert hashes(tmp_path) == before


def test_a_foreign_shard_among_ours_is_refused(tmp_path):
    prepare(tmp_path)
    (tmp_path / "raw" / "00009.tar").write_bytes((tmp_path / "raw" / "00000.tar").read_bytes())
    with pytest.raises(DataError, match=r"00009\.tar, which prepare did not write"):
        prepare(tmp_path)


def test_a_full_disk_is_a_storage_error_and_the_next_run_goes_on(tmp_path, monkeypatch):
    import tokscale.base.files as files

    calls, real = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="free space") as caught:
        prepare(tmp_path)
    assert caught.value.exit_code == 74 and not (tmp_path / "raw" / "manifest.json").exists()
    monkeypatch.setattr(files.os, "fsync", real)
    assert not prepare(tmp_path).skipped and len(RawDataset(tmp_path / "raw")) == 30


def folder_of_images(root, good: int, bad: int):
    from tokscale.data.raw.images import encode_image
    from tokscale.data.raw.shapes import render

    root.mkdir()
    for index in range(good + bad):
        data = encode_image(render(sample_scene(0, index)), "png")
        (root / f"{index:03d}.png").write_bytes(data if index < good else data[:50])
        (root / f"{index:03d}.txt").write_text(f"image {index}")
    return {"kind": "folder", "path": str(root)}


def test_unusable_samples_are_skipped_counted_and_listed(tmp_path):
    source = folder_of_images(tmp_path / "in", good=18, bad=4)
    (tmp_path / "in" / "000.txt").unlink()
    result = prepare(tmp_path, source=source, max_drop_fraction=0.5)
    manifest = read_raw_manifest(tmp_path / "raw")
    assert manifest.samples == 17 and manifest.drops == {"caption_missing": 1, "truncated": 4}
    assert "5 left out" in result.summary
    lines = [json.loads(line) for line in (tmp_path / "raw" / "rejected.jsonl").read_text().splitlines()]
    assert lines[1]["name"] == "018.png" and lines[1]["shard"] == "00001.tar"
    assert [(line["index"], line["reason"]) for line in lines] == [(0, "caption_missing")] + [
        (index, "truncated") for index in range(18, 22)
    ]
    assert [len(RawShard(path).samples) for path in RawDataset(tmp_path / "raw").paths] == [9, 8, 0]
    assert prepare(tmp_path, source=source, max_drop_fraction=0.5).skipped


def test_too_many_unusable_samples_stop_the_stage(tmp_path):
    source = folder_of_images(tmp_path / "in", good=18, bad=4)
    with pytest.raises(
        DataError, match=r"^2 of the first 20 .*\(2 truncated\), more than max_drop_fraction=0.02 of 22"
    ) as caught:
        prepare(tmp_path, source=source)
    assert caught.value.exit_code == 65 and not (tmp_path / "raw" / "manifest.json").exists()
    assert len((tmp_path / "raw" / "rejected.jsonl").read_text().splitlines()) == 2
    assert not prepare(tmp_path, source=source, max_drop_fraction=0.2).skipped  # the whole shards are kept


def test_the_contact_sheet_shows_images_with_captions(tmp_path):
    from PIL import Image

    prepare(tmp_path, preview=9)
    sheet = Image.open(tmp_path / "raw" / "preview.png")
    assert sheet.width > 3 * 128 and len(sheet.convert("RGB").getcolors(1 << 20)) > 20
    (tmp_path / "raw" / "preview.png").unlink()
    assert prepare(tmp_path, preview=9).skipped and (tmp_path / "raw" / "preview.png").exists()


def test_a_validation_set_stands_beside(tmp_path):
    prepare(tmp_path)
    prepare(tmp_path, source={"kind": "shapes", "count": 10, "split": "validation"}, output="raw_validation")
    assert len(RawDataset(tmp_path / "raw_validation")) == 10


def test_output_is_one_folder_name():
    with pytest.raises(ConfigError, match="name of one folder below data_dir"):
        decode(PrepareConfig, {"output": "../elsewhere"})


def test_a_preparation_that_made_nothing_does_not_bind_the_folder(tmp_path):
    folder_of_images(tmp_path / "in", good=18, bad=0)
    (tmp_path / "list.csv").write_text("path,caption\n" + "".join(f"{n:03d}.png,a\n" for n in range(18)))
    wrong = {"kind": "csv", "path": str(tmp_path / "list.csv")}
    with pytest.raises(DataError, match=r"10 unreadable\).*the first is row 1 \(unreadable"):
        prepare(tmp_path, source=wrong)
    assert prepare(tmp_path, source=wrong | {"root": str(tmp_path / "in")}).metrics["samples"] == 18
    with pytest.raises(DataError, match="holds another data set"):
        prepare(tmp_path, source=wrong)


def test_a_preparation_that_gave_up_is_begun_anew_as_its_error_says(tmp_path):
    folder_of_images(tmp_path / "in", good=18, bad=0)
    for path in sorted((tmp_path / "in").glob("*.txt"))[3:]:
        path.unlink()
    source = {"kind": "folder", "path": str(tmp_path / "in"), "captions": "required"}
    with pytest.raises(DataError, match=r"caption_missing.*source\.captions=none takes images without"):
        prepare(tmp_path, source=source)
    assert any((tmp_path / "raw").glob("*.tar"))
    assert prepare(tmp_path, source=source | {"captions": "none"}).metrics["samples"] == 18
    assert prepare(tmp_path, source=source | {"captions": "none"}).skipped


def test_class_folders_are_prepared_without_captions_and_keep_their_names(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "in").mkdir(exist_ok=True)
        folder_of_images(tmp_path / "in" / name, good=3, bad=0)
    source = {"kind": "folder", "path": str(tmp_path / "in"), "labels": "folder", "captions": "none"}
    result = prepare(tmp_path, source=source, preview=4)
    manifest = read_raw_manifest(tmp_path / "raw")
    assert manifest.classes == ("cat", "dog") and not manifest.captions and "of 2 classes" in result.summary
    with RawShard(tmp_path / "raw" / "00000.tar") as shard:
        assert [shard.read(sample, "cls") for sample in shard.samples] == [b"0"] * 3 + [b"1"] * 3
        assert all("txt" not in sample.members for sample in shard.samples)


def test_a_broken_table_is_refused_or_its_rows_are_listed(tmp_path):
    folder_of_images(tmp_path / "in", good=10, bad=0)
    rows = [f"{n:03d}.png\tplain {n}" for n in range(10)]
    rows[2] = '002.png\t"Hello there 2'
    (tmp_path / "in" / "list.tsv").write_text("\n".join(["path\tcaption", *rows]) + "\n")
    source = {"kind": "csv", "path": str(tmp_path / "in/list.tsv"), "delimiter": "tab"}
    with pytest.raises(DataError, match="row 3 opens a quote"):
        prepare(tmp_path, source=source)
    source |= {"on_bad_row": "drop"}
    assert prepare(tmp_path, source=source, max_drop_fraction=0.1).metrics["samples"] == 9
    (line,) = [json.loads(line) for line in (tmp_path / "raw" / "rejected.jsonl").read_text().splitlines()]
    assert (line["name"], line["reason"]) == ("row 3", "bad_row")
