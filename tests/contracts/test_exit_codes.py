"""Bad input, preemption and failures by the command line: the code of each, left in `exit.json`, and nothing lost."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_pipeline

from tokscale import cli
from tokscale.base import errors
from tokscale.checkpoint.commit import checkpoint_folders
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.runs.run_folder import locked_run_dir
from tokscale.runs.stage import StageConfig
from tokscale.train.metrics import read_metrics

CODES = {
    "ConfigError": 64,
    "DataError": 65,
    "EnvironmentRefused": 69,
    "StorageError": 74,
    "StopRequested": 75,
    "StalledError": 76,
    "PeerLostError": 76,
    "NonFiniteError": 77,
    "CheckpointError": 78,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_inputs(folder)
    assert train(folder, folder / "six") == 0
    return folder


@pytest.fixture
def six(pipeline, tmp_path) -> Path:
    """A run folder of one's own, with checkpoints of steps 3 and 6."""
    return Path(shutil.copytree(pipeline / "six", tmp_path / "run"))


def train(pipeline: Path, run_dir: Path, *words: str) -> int:
    model = ", ".join(f"{key}: {value}" for key, value in tiny_pipeline.MODEL.items())
    return cli.main(
        [
            "train",
            f"run_dir={run_dir}",
            f"data_dir={pipeline}/data",
            f"image_tokenizer={pipeline}/image_tokenizer",
            f"text_tokenizer={pipeline}/text_tokenizer",
            f"model={{{model}}}",
            "batch_size=8",
            "loop={total_steps: 6, log_every: 1}",
            "checkpoint.every_steps=3",
            *words,
        ]
    )


def left_behind(run_dir: Path) -> int:
    return json.loads((run_dir / "exit.json").read_text())["code"]


def steps(run_dir: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(run_dir / "checkpoints")]


def test_the_family_of_errors_has_the_codes_that_schedulers_are_told():
    family = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert {name: kind.exit_code for name, kind in family.items() if name != "TokscaleError"} == CODES
    assert all(issubclass(kind, errors.TokscaleError) for kind in family.values())


def test_0_done_and_done_again(pipeline, six, capsys):
    assert train(pipeline, six) == 0 and left_behind(six) == 0
    assert "train: already done: dalle at step 6" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["loop.totl_steps=5", "batch_size=6 micro_batches=4", "engine=zero4", "optim.lr=-1"])
def test_64_what_cannot_be_honoured(pipeline, six, wrong, capsys):
    assert train(pipeline, six, *wrong.split()) == 64 and left_behind(six) == 64
    assert steps(six) == ["step_000000003", "step_000000006"] and "Traceback" not in capsys.readouterr().err


def test_64_a_folder_with_a_different_run(pipeline, six, capsys):
    assert train(pipeline, six, "seed=1") == 64
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert left_behind(six) == 0 and len(read_metrics(six)) == 6  # nothing in it was touched


def test_65_token_shards_of_another_tokenizer(pipeline, tmp_path, capsys):
    tiny_pipeline.make_image_tokenizer(tmp_path / "other", seed=1)
    assert train(pipeline, tmp_path / "run", f"image_tokenizer={tmp_path}/other") == 65
    assert left_behind(tmp_path / "run") == 65 and "holds ids of the image tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "not a tar", "missing"])
def test_65_a_damaged_shard(pipeline, tmp_path, damage, capsys):
    shutil.copytree(pipeline / "data", tmp_path / "data")
    (shard,) = (tmp_path / "data/tokens").glob("*.tar")
    whole = shard.read_bytes()
    match damage:
        case "truncated":
            shard.write_bytes(whole[: len(whole) // 3])
        case "not a tar":
            shard.write_bytes(b"\0" * len(whole))
        case "missing":
            shard.unlink()
    assert train(pipeline, tmp_path / "run", f"data_dir={tmp_path}/data") == 65
    assert left_behind(tmp_path / "run") == 65 and shard.name in capsys.readouterr().err


def test_69_a_folder_in_which_another_job_works(pipeline, six, capsys):
    with locked_run_dir(six / "elsewhere", "train", StageConfig(), Comm(ProcessEnv())):
        shutil.copytree(six / "checkpoints", six / "elsewhere/checkpoints")
        (six / "elsewhere/config.yaml").write_text((six / "config.yaml").read_text())
        assert train(pipeline, six / "elsewhere", "loop.total_steps=8", "on_change=record") == 69
    assert "in use by process" in capsys.readouterr().err and not (six / "elsewhere/exit.json").exists()
    assert train(pipeline, six / "elsewhere", "loop.total_steps=8", "on_change=record") == 0


def test_74_a_full_disk(pipeline, six, capsys):
    (six / "command.txt").unlink()
    (six / "command.txt").symlink_to("/dev/full")
    assert train(pipeline, six, "loop.total_steps=9", "on_change=record") == 74 and left_behind(six) == 74
    assert "No space left on device; free space" in capsys.readouterr().err
    (six / "command.txt").unlink()
    assert train(pipeline, six, "loop.total_steps=9", "on_change=record") == 0 and len(read_metrics(six)) == 9


def test_75_stopped_on_request_with_the_state_saved(pipeline, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    assert train(pipeline, run_dir) == 75 and left_behind(run_dir) == 75 and steps(run_dir) == ["step_000000001"]
    assert "the state is saved" in capsys.readouterr().err
    assert train(pipeline, run_dir) == 0 and left_behind(run_dir) == 0
    assert [row["loss"] for row in read_metrics(run_dir)] == [row["loss"] for row in read_metrics(pipeline / "six")]


def test_77_a_loss_that_is_not_finite(pipeline, tmp_path, capsys):
    run, better = tmp_path / "run", "optim.lr=0.001"
    words = ("optim.lr=1e30", "loop.max_nonfinite=2", "loop.total_steps=12", "checkpoint.every_steps=50")
    assert train(pipeline, run, *words) == 77 and left_behind(run) == 77
    said = capsys.readouterr().err
    assert "nothing was saved yet. Begin again" in said and "on_change" not in said
    # The way out that the message names is accepted.
    assert train(pipeline, run, better, *words[1:3], "checkpoint.every_steps=6") == 0 and left_behind(run) == 0

    longer = ("loop.max_nonfinite=2", "loop.total_steps=24", "checkpoint.every_steps=50", "on_change=record")
    assert train(pipeline, run, "optim.lr=1e30", *longer) == 77
    assert (back := re.findall(r"resume_from=\d+ on_change=record", capsys.readouterr().err)[0].split())[1] in longer
    assert train(pipeline, run, better, *longer[:3]) == 64
    assert train(pipeline, run, better, *longer[:3], *back) == 0 and left_behind(run) == 0


def test_78_checkpoints_of_which_none_can_be_read(pipeline, six, capsys):
    for folder in checkpoint_folders(six / "checkpoints"):
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes()[:-1])
    assert train(pipeline, six, "loop.total_steps=8") == 78 and left_behind(six) == 78
    assert "none of its 2 checkpoints can be used" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(pipeline, six):
    newest = checkpoint_folders(six / "checkpoints")[-1]
    (newest / "manifest.json").write_bytes(b"")
    assert train(pipeline, six) == 0
    assert [row["loss"] for row in read_metrics(six)] == [row["loss"] for row in read_metrics(pipeline / "six")]
