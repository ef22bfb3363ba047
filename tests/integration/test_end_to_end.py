"""From images to images by the commands a person types, killed on the way, and typed again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tokscale.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TOKSCALE = str(Path(sys.executable).parent / "tokscale")
STAGES = ["prepare", "train-tokenizer", "tokenize", "train", "export", "sample", "evaluate"]
PROMPTS = "['a small red circle at the top left', 'a large blue square at the centre']"


def start(stage: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    keys = ["recipe=debug/dalle", f"run_dir={folder}", *words]
    keys += [f"prompts={PROMPTS}"] if stage == "sample" else []
    keys += ["engine=zero3", "deterministic=true"] if stage == "train" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [TOKSCALE, stage, *keys], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(stage: str, folder: Path, *words: str) -> str:
    process = start(stage, folder, *words)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    for stage in STAGES:
        run(stage, folder)
    return folder


def test_it_ends_with_images_and_a_report(pipeline):
    with Image.open(pipeline / "samples" / "grid.png") as grid:
        assert grid.size[0] > 128
    assert len(list((pipeline / "samples").glob("000*_a-*.png"))) == 2
    report = json.loads((pipeline / "report.json").read_text())
    for split in ("seen", "held_out"):
        assert set(report["prompt_accuracy"][split]) == {"exact", "size", "colour", "shape", "position", "count"}
    assert 0 <= report["reconstruction_accuracy"] <= 1
    assert set(report["held_out_losses"]) == {"total", "text", "image"}
    assert set(report["seconds"]) >= set(STAGES) - {"evaluate"}
    for metric in ("tokenization_images_per_second", "training_tokens_per_second", "peak_memory_bytes"):
        assert report[metric] > 0


def test_what_is_finished_is_recognised(pipeline):
    before = {path: path.stat().st_mtime_ns for path in pipeline.rglob("*.tar")}
    before |= {path: path.stat().st_mtime_ns for path in pipeline.rglob("*.safetensors")}
    for stage in STAGES:
        run(stage, pipeline)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_pipeline_that_is_killed_at_every_stage_ends_where_the_undisturbed_one_does(pipeline, tmp_path):
    folder = tmp_path / "run"
    for number, stage in enumerate(STAGES):
        process = start(stage, folder)
        time.sleep(1.5 + 0.7 * number)  # somewhere between the start and the end
        process.send_signal(signal.SIGKILL)
        process.communicate()
        run(stage, folder)
    for there, here in zip(read_metrics(pipeline), read_metrics(folder), strict=True):
        assert there["loss"] == here["loss"]
    same = "model.safetensors"
    assert (pipeline / "export" / same).read_bytes() == (folder / "export" / same).read_bytes()
    for name in ("samples.json", "grid.png"):
        assert (pipeline / "samples" / name).exists() and (folder / "samples" / name).exists()
    assert (pipeline / "samples" / "grid.png").read_bytes() == (folder / "samples" / "grid.png").read_bytes()


@pytest.mark.parametrize(
    ("stage", "words", "code", "message"),
    [
        ("train", ["modle.dim=3"], 64, "did you mean 'model'?"),
        ("train", ["batch_size=9", "micro_batches=2"], 64, "batch_size=9 does not divide"),
        ("sample", ["sampling.temperatur=1"], 64, "did you mean 'temperature'?"),
        ("tokenize", ["raw=/nowhere"], 65, "/nowhere"),
        ("export", ["run_dir=/nowhere"], 78, "/nowhere"),
    ],
)
def test_bad_input_is_answered_with_its_exit_code(pipeline, stage, words, code, message):
    process = start(stage, pipeline, *words)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == code, said
    assert message in said and "Traceback" not in said


def test_workers_that_end_together_close_the_data_set_in_turns(pipeline, tmp_path):
    words = [
        f"data_dir={pipeline / 'data'}",
        f"image_tokenizer={pipeline / 'image_tokenizer'}",
        f"tokens={tmp_path / 'tokens'}",
    ]
    workers = [start("tokenize", tmp_path / str(number), *words) for number in range(3)]
    for worker in workers:
        said, _ = worker.communicate(timeout=200)
        assert worker.returncode == 0, said
    there, here = (
        json.loads((folder / "dataset.json").read_text()) for folder in (pipeline / "data/tokens", tmp_path / "tokens")
    )
    assert there["shards"] == here["shards"]
