"""The same run under every launcher: one loss, the ranks it should have, and the exit code that came out of it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_pipeline

from tokscale.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STEPS = 20
TRAIN = ("launch/train.py",)
KILLED_AFTER_12_STEPS = """
import os, signal, sys
from tokscale import cli
from tokscale.train.loop import Trainer

go_on = Trainer._save_or_stop

def killed(trainer, step, *asked):
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    go_on(trainer, step, *asked)

Trainer._save_or_stop = killed
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_inputs(folder)
    return folder


def keys(pipeline: Path, run_dir: Path) -> list[str]:
    model = ", ".join(f"{key}: {value}" for key, value in tiny_pipeline.MODEL.items())
    return [
        f"run_dir={run_dir}",
        f"data_dir={pipeline}/data",
        f"image_tokenizer={pipeline}/image_tokenizer",
        f"text_tokenizer={pipeline}/text_tokenizer",
        f"model={{{model}}}",
        "batch_size=8",
        "optim.lr=1e-2",
        "engine.dtype=fp32",  # engines are compared to the last digits, on a CPU that may compute bf16
        f"loop={{total_steps: {STEPS}, log_every: 1}}",
        "checkpoint.every_steps=10",
    ]


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} | more


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)


def start_ranks(words: list[str], folder: Path, second: Sequence[str] = TRAIN) -> list[subprocess.Popen[bytes]]:
    """Two ranks without a launcher above them, so that the death of one is the death of that one."""
    ranks, where = [], {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    for rank in ("0", "1"):
        with open(folder / f"said_by_{rank}.txt", "ab") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *(second if rank == "1" else TRAIN), *words],
                    cwd=ROOT,
                    env=environment(RANK=rank, LOCAL_RANK=rank, **where),
                    stdout=log,
                    stderr=log,
                )
            )
    return ranks


def port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def launcher(name: str) -> list[str]:
    return {
        "tokscale": [str(BIN / "tokscale"), "train"],
        "python": [sys.executable, "launch/train.py"],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--standalone", "launch/run.py", "train"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port(), "launch/train.py"],
    }[name]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def alone(pipeline, tmp_path_factory) -> list[float]:
    """The losses of the eager engine in one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    ended = start([*launcher("tokscale"), *keys(pipeline, run_dir)])
    assert ended.returncode == 0, ended.stderr
    assert "train: dalle at step 20" in ended.stdout and "next: tokscale export" in ended.stdout
    found = losses(run_dir)
    assert len(found) == STEPS and found[-1] < 0.9 * found[0]
    return found


def test_python_starts_the_same_program(pipeline, tmp_path, alone):
    ended = start([*launcher("python"), *keys(pipeline, tmp_path), "--local_rank=0"])
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path) == alone


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_two_ranks_of_zero_3_have_the_losses_of_one_process(pipeline, tmp_path, alone, name):
    ended = start([*launcher(name), *keys(pipeline, tmp_path), "engine=zero3", "engine.param_persistence_threshold=0"])
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = losses(tmp_path)
    assert found[0] == pytest.approx(alone[0], rel=1e-6) and found == pytest.approx(alone, rel=1e-5)
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["world"] == 2 and env["launcher"] == "torchrun"  # deepspeed sets the same variables
    assert (tmp_path / "logs/rank_0001.log").exists()
    assert ended.stdout.count("train: dalle at step 20") == 1, "only the main rank speaks"


def test_killing_a_rank_of_zero_3_and_starting_again_gives_the_undisturbed_losses(pipeline, tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for run_dir in (killed, undisturbed):
        run_dir.mkdir()
    words = [*keys(pipeline, killed), "engine=zero3", "engine.param_persistence_threshold=0"]
    ranks = start_ranks(words, tmp_path, ("-c", KILLED_AFTER_12_STEPS))
    assert ranks[1].wait(timeout=250) == -9
    assert ranks[0].wait(timeout=120) == 76, "a rank left alone does not go on, and says that it was another's failure"
    assert "PeerLostError: another rank is gone" in json.loads((killed / "exit.json").read_text())["message"]
    assert "Traceback" in (killed / "logs/rank_0000.log").read_text()
    assert 11 <= len(losses(killed)) <= 12  # the twelfth may die with it on its way
    for folder in (killed, undisturbed):
        again = [word.replace(str(killed), str(folder)) for word in words]
        assert [rank.wait(timeout=250) for rank in start_ranks(again, tmp_path)] == [0, 0]
    assert losses(killed) == losses(undisturbed) and len(losses(killed)) == STEPS


def test_the_exit_code_is_left_behind_whatever_the_launcher_makes_of_it(pipeline, tmp_path):
    tmp_path.joinpath("STOP").touch()
    ended = start([*launcher("torchrun"), *keys(pipeline, tmp_path)])
    assert ended.returncode not in (0, 75), "torchrun has a code of its own"
    left = json.loads((tmp_path / "exit.json").read_text())
    assert left["code"] == 75 and "the state is saved" in left["message"]
    ended = start([*launcher("deepspeed"), *keys(pipeline, tmp_path), "micro_batches=3"])
    assert ended.returncode == 64 and "does not divide into 2 ranks x micro_batches=3" in ended.stderr
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 64
