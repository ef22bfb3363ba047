"""`sample` for thousands of prompts: from files, unit by unit, into folders, tars and parquet, with sweeps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny_exports
import tiny_pipeline
import torch
from PIL import Image

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError, StopRequested
from tokscale.base.files import read_json
from tokscale.data.raw.prompts import read_prompts
from tokscale.data.raw.shards import RawDataset
from tokscale.dist.env import ProcessEnv
from tokscale.inference.grids import labelled_grid
from tokscale.inference.pretrained import Pretrained
from tokscale.runs.lock import RunFolderInUseError
from tokscale.stages import sample, sample_job
from tokscale.train.signals import StopRequests

PROMPTS = tiny_pipeline.CAPTIONS[:7]


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    tiny_exports.make_exports(folder)
    return folder / "dalle"


def config_of(export: Path, out: Path, **options: Any) -> sample.SampleConfig:
    return decode(sample.SampleConfig, {"export": export, "out": out, "prompts": PROMPTS, "device": "cpu"} | options)


def drawn(export: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    result = sample.run(config_of(export, out, **options), ProcessEnv())
    return read_json(result.outputs["listing"])["images"]


def files_in(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_format_holds_the_same_images_with_prompts_and_seeds(export, tmp_path):
    options = {"num_images": 2, "shard_images": 6, "batch_size": 4, "rerank": export.parent / "clip"}
    rows = {kind: drawn(export, tmp_path / kind, format=kind, **options) for kind in ("folder", "tar", "parquet")}
    plain = [{name: value for name, value in row.items() if name != "file"} for row in rows["folder"]]
    assert [row["prompt"] for row in plain] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [row["number"] for row in plain] == list(range(14)) and len({row["seed"] for row in plain}) == 14
    for kind in ("tar", "parquet"):
        assert [{name: value for name, value in row.items() if name != "file"} for row in rows[kind]] == plain
    images = [(tmp_path / "folder" / row["file"]).read_bytes() for row in rows["folder"]]
    raw = RawDataset(tmp_path / "tar")
    found = [raw.sample(number) for number in range(len(raw))]
    assert [shard.image(one) for shard, one in found] == images
    assert [shard.captions(one) for shard, one in found] == [(row["prompt"],) for row in plain]
    names = ["00000.parquet", "00001.parquet", "00002.parquet"]
    table = pyarrow.concat_tables([pyarrow.parquet.read_table(tmp_path / "parquet" / name) for name in names])
    assert [cell["bytes"] for cell in table.column("image").to_pylist()] == images
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and list(features) == table.column_names
    for column in ("prompt", "seed", "clip"):
        assert table.column(column).to_pylist() == pytest.approx([row[column] for row in plain])


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_what_was_interrupted_goes_on_and_nothing_is_drawn_twice(export, tmp_path, monkeypatch, kind):
    options = {"num_images": 2, "shard_images": 4, "batch_size": 2, "format": kind}
    drawn(export, tmp_path / "whole", **options)
    original, told = Pretrained.sample, []

    def counted(self, prompts, *, seeds: list[int], **keys):
        told.extend(seeds)
        return original(self, prompts, seeds=seeds, **keys)

    monkeypatch.setattr(Pretrained, "sample", counted)
    with monkeypatch.context() as patch, pytest.raises(StopRequested, match="finished units are kept"):
        # Asked to stop inside of the third unit: two are done, two of its images are lost.
        patch.setattr(StopRequests, "flags", lambda self: {"stop": len(told) >= 10, "save": False, "requeue": True})
        drawn(export, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "samples.json").exists() and len(told) == 10
    drawn(export, tmp_path / "out", **options)
    assert len(told) == 16 and len(set(told)) == 14, "only the unit that was lost is drawn again"
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert sample.run(config_of(export, tmp_path / "out", **options), ProcessEnv()).skipped


def test_ranks_share_the_units_and_the_main_one_closes(export, tmp_path):
    options = {"shard_images": 1}
    whole = drawn(export, tmp_path / "whole", **options)
    config = config_of(export, tmp_path / "shared", **options)
    job = sample_job.SampleJob(config, ProcessEnv(rank=1, world=2), PROMPTS)
    assert job.due() == [3, 4, 5, 6, 0, 1, 2], "each rank begins elsewhere"
    job.begin()
    with job.leases() as elsewhere:
        for unit in (0, 1, 2, 5):
            elsewhere.claim(unit)
        worker = sample_job.SampleJob(config, ProcessEnv(rank=1, world=2), PROMPTS)
        with worker.leases() as leases:
            assert worker.draw_due(leases, wait=False, stop=lambda: False, progress=lambda n: None) == 3
        assert worker.due() == [2, 5, 0, 1] and not (tmp_path / "shared" / "samples.json").exists()
    assert drawn(export, tmp_path / "shared", **options) == whole, "units of workers that are gone are taken over"
    assert files_in(tmp_path / "shared") == files_in(tmp_path / "whole")


def test_images_are_written_as_they_are_drawn(export, tmp_path, monkeypatch):
    original, seen = Pretrained.sample, []

    def watched(self, prompts, **keys):
        seen.append(len(list(tmp_path.glob("*.png"))))
        return original(self, prompts, **keys)

    monkeypatch.setattr(Pretrained, "sample", watched)
    drawn(export, tmp_path, batch_size=2)
    assert seen == [0, 2, 4, 6], "memory holds one batch"


def test_another_request_replaces_the_images_of_the_one_before(export, tmp_path):
    before = drawn(export, tmp_path)
    after = drawn(export, tmp_path, prompts=PROMPTS[:2], seed=1)
    assert len(before) == 7 and len(after) == 2
    assert sorted(files_in(tmp_path)) == sorted([row["file"] for row in after] + ["grid.png", "samples.json"])
    job = sample_job.SampleJob(config_of(export, tmp_path), ProcessEnv(), PROMPTS)
    job.begin()
    with job.leases() as leases:
        assert leases.claim(0) == "new"
        with pytest.raises(RunFolderInUseError, match="other prompts or options are being drawn there; give out="):
            drawn(export, tmp_path, seed=2)


def test_a_sweep_draws_each_prompt_with_every_combination_from_the_same_seeds(export, tmp_path):
    sweep = {"temperature": [0.5, 2.0], "cond_scale": [1, 4]}
    rows = drawn(export, tmp_path / "sweep", prompts=PROMPTS[:2], sweep=sweep, batch_size=1)
    settings = [{"temperature": t, "cond_scale": s} for t in (0.5, 2.0) for s in (1, 4)]
    assert [row["sampling"] for row in rows] == settings * 2
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS[:2] for _ in range(4)]
    assert len({row["seed"] for row in rows}) == 2
    for place, options in enumerate(settings):
        alone = drawn(export, tmp_path / str(place), prompts=PROMPTS[:2], sampling=options, batch_size=1)
        for prompt in range(2):
            swept = tmp_path / "sweep" / rows[4 * prompt + place]["file"]
            assert swept.read_bytes() == (tmp_path / str(place) / alone[prompt]["file"]).read_bytes()
    columns = [", ".join(f"{name} {value}" for name, value in one.items()) for one in settings]
    images = [Image.open(tmp_path / "sweep" / row["file"]) for row in rows]
    pixels = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])
    pixels = pixels.unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2)
    wanted = labelled_grid(pixels, [row["prompt"] for row in rows], columns=4, headers=columns)
    assert Image.open(tmp_path / "sweep" / "grid.png").tobytes() == wanted.tobytes()


def test_rows_of_the_grid_follow_the_prompts(export, tmp_path):
    rows = drawn(export, tmp_path, prompts=PROMPTS[:3], num_images=5)
    sheet = Image.open(tmp_path / "grid.png")
    cell_w, cell_h = 128 + 6, (sheet.height - 6) // 3
    assert sheet.width == 5 * cell_w + 6
    for number, row in enumerate(rows):
        corner = (6 + number % 5 * cell_w, 6 + number // 5 * cell_h)
        shown = sheet.crop((*corner, corner[0] + 128, corner[1] + 128))
        image = Image.open(tmp_path / row["file"]).resize((128, 128), Image.Resampling.NEAREST)
        assert shown.tobytes() == image.tobytes(), f"image {number} stands in row {number // 5}"


@pytest.mark.parametrize(
    ("options", "error", "answer"),
    [
        ({"sweep": {"temperature": []}}, ConfigError, "sweep.temperature: got no values"),
        ({"sweep": {"temperature": [1]}, "sampling": {"temperature": 2}}, ConfigError, "stands in sampling, too"),
        ({"sweep": {"temprature": [1]}}, ConfigError, "did you mean 'temperature'"),
        ({"sweep": {"temperature": [1, -1]}}, ConfigError, "sampling.temperature: got -1"),
        ({"prompts_column": "text"}, ConfigError, "names a column of prompts_file"),
        ({"format": "zip"}, ConfigError, "format: got 'zip'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(export, tmp_path, options, error, answer):
    with pytest.raises(error, match=answer):
        drawn(export, tmp_path, **options)
    assert not list(tmp_path.glob("*.png"))


def test_prompts_come_from_texts_and_tables(tmp_path):
    wanted = ["a red, round thing", "猫", "7"]
    (tmp_path / "a.txt").write_text("a red, round thing\n\n猫\n 7 \n")
    (tmp_path / "a.csv").write_text('id,caption\n1,"a red, round thing"\n2,猫\n3,7\n')
    (tmp_path / "a.tsv").write_text("id\ttext\n1\ta red, round thing\n2\t猫\n3\t7\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a red, round thing"}\n{"prompt": "猫"}\n{"prompt": 7}\n')
    pyarrow.parquet.write_table(pyarrow.table({"what": wanted}), tmp_path / "a.parquet")
    for name, column in (("a.txt", None), ("a.csv", None), ("a.tsv", None), ("a.jsonl", None), ("a.parquet", "what")):
        assert read_prompts(tmp_path / name, column) == wanted, name
    with pytest.raises(DataError, match=r"a\.parquet has no column 'prompt'; give prompts_column=NAME, one of what"):
        read_prompts(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'txet'; did you mean 'text'"):
        read_prompts(tmp_path / "a.tsv", "txet")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(DataError, match="row 2 has '' for a prompt"):
        read_prompts(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="is no table"):
        read_prompts(tmp_path / "a.txt", "text")
    (tmp_path / "c.csv").write_text("prompt,x\na,1\nb\n")
    with pytest.raises(DataError, match="row 2 has 1 fields, the header 2"):
        read_prompts(tmp_path / "c.csv")


def test_more_images_of_a_prompt_than_memory_holds_are_refused_before_any_is_drawn(tmp_path):
    for options in ({"num_images": 999_999_999_999}, {"num_images": 2, "best_of": 40_000, "rerank": tmp_path}):
        with pytest.raises(ConfigError, match=r"num_images=\d+ of best_of=\d+ draws \d+ images .* at most 65536"):
            config_of(tmp_path, tmp_path / "out", **options)
    assert config_of(tmp_path, tmp_path / "out", num_images=65_536).num_images == 65_536
