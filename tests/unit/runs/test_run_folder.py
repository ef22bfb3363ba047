"""A run folder belongs to one run, and to one job at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from tokscale.base.config import Config
from tokscale.base.errors import DataError
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.runs.lock import RunFolderInUseError, holder
from tokscale.runs.run_folder import RunConfigMismatchError, locked_run_dir
from tokscale.runs.stage import StageConfig

ALONE = Comm(ProcessEnv())


class Eager(Config):
    kind: Literal["eager"] = "eager"
    dtype: str = "fp32"


class Zero(Config):
    kind: Literal["zero"] = "zero"
    dtype: str = "fp32"
    stage: int = 3


class Model(Config):
    dim: int = 8


class ToyConfig(StageConfig):
    model: Model = Model()
    engine: Annotated[Eager | Zero, Field(discriminator="kind")] = Eager()
    micro_batches: int = 1
    batch_size: int = 8


def claim(folder: Path, stage: str = "train", products: dict[str, Path] | None = None, **values) -> None:
    with locked_run_dir(folder, stage, ToyConfig(run_dir=folder, **values), ALONE, products or {}):
        pass


def saved(folder: Path) -> None:
    (folder / "checkpoints" / "step_000000005").mkdir(parents=True)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in ("logs", "lock", "outcomes")
    }


def test_the_folder_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    claim(tmp_path / "run", model=Model(dim=16))
    claim(tmp_path / "run", model=Model(dim=16))
    sections = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert ToyConfig(**sections["train"]).model.dim == 16
    assert len((tmp_path / "run/command.txt").read_text().splitlines()) == 2
    env = json.loads((tmp_path / "run/env.json").read_text())
    assert env["versions"]["torch"] and env["world"] == 1 and env["variables"]["OMP_NUM_THREADS"] == "1"
    assert "secret" not in (tmp_path / "run/env.json").read_text()
    assert (tmp_path / "run/logs/rank_0000.log").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": Model(dim=9)}, "model.dim is 8 there and 9 here"),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"batch_size": 16}, "batch_size is 8 there and 16 here"),
        ({"engine": Eager(dtype="bf16")}, "engine.dtype is 'fp32' there and 'bf16' here"),
    ],
)
def test_another_run_is_refused_by_the_keys_that_differ(tmp_path, changed, named):
    claim(tmp_path)
    saved(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(RunConfigMismatchError, match=named) as caught:
        claim(tmp_path, **changed)
    assert caught.value.exit_code == 64 and "another run_dir" in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == before


def test_another_stage_is_refused(tmp_path):
    claim(tmp_path, "train-tokenizer")
    saved(tmp_path)
    with pytest.raises(RunConfigMismatchError, match="a run of train-tokenizer, not of train"):
        claim(tmp_path, "train")


PROTECTING = {
    "a checkpoint": "checkpoints/step_000000005/manifest.json",
    "a damaged checkpoint": "checkpoints/step_000000005/index.json",
    "checkpoints set aside": "checkpoints/set_aside/x/step_000000005/manifest.json",
    "a stage that ended well": "stages/train.json",
    "an export whose checkpoints are gone": "stages/export.json",
    "drawn images": "stages/sample.json",
}


@pytest.mark.parametrize("what", [*PROTECTING, "a link to checkpoints elsewhere"])
def test_whatever_was_saved_protects_the_folder(tmp_path, what):
    claim(tmp_path)
    if what in PROTECTING:
        path = tmp_path / PROTECTING[what]
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    else:
        (tmp_path / "checkpoints").symlink_to(tmp_path / "archive" / "not-mounted")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    before = contents(tmp_path)
    with pytest.raises(RunConfigMismatchError, match="seed is 0 there and 3 here"):
        claim(tmp_path, seed=3)
    assert contents(tmp_path) == before


def test_a_folder_in_which_nothing_was_saved_is_described_anew(tmp_path, capfd):
    claim(tmp_path)
    (tmp_path / "checkpoints/.step_000000005.ab12.tmp").mkdir(parents=True)  # killed in its first save
    (tmp_path / "checkpoints/best.json").write_text('{"metric": "x", "best": [{"step": 5, "value": 1}]}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    (tmp_path / "arithmetic.json").write_text('{"dtype": "bf16"}')
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/train-tokenizer.json").write_text("{}")  # what this run reads, not what it made
    capfd.readouterr()
    claim(tmp_path, model=Model(dim=9), engine=Eager(dtype="auto"))
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "described anew" in line]
    assert "model.dim is 8 there and 9 here" in said and "set_aside" in said
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["model"]["dim"] == 9
    (aside,) = (tmp_path / "set_aside").iterdir()
    assert (aside / "metrics.jsonl").read_text() == '{"step": 3, "loss": 1.0}\n'
    assert len((aside / "starts.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 1
    left = ("metrics.jsonl", "arithmetic.json", "checkpoints/best.json")
    assert not any((tmp_path / name).exists() for name in left)
    claim(tmp_path, model=Model(dim=9), engine=Eager(dtype="auto"))  # the same again is no other run
    assert len(list((tmp_path / "set_aside").iterdir())) == 1


def test_a_folder_of_another_stage_that_saved_nothing_is_free(tmp_path):
    claim(tmp_path, "train-tokenizer")
    claim(tmp_path, "train")
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == ["train"]


def test_a_product_that_stands_keeps_its_keys_and_no_others(tmp_path):
    made = tmp_path / "model"
    claim(tmp_path / "run", products={"model": made})
    claim(tmp_path / "run", products={"model": made}, model=Model(dim=9))
    made.mkdir()
    (made / "config.json").write_text("{}")
    claim(tmp_path / "run", products={"model": made}, model=Model(dim=9), seed=3)
    with pytest.raises(RunConfigMismatchError, match=r"model: was made by .*model\.dim is 9 there and 8 here"):
        claim(tmp_path / "run", products={"model": made}, seed=3)


def test_a_live_job_that_has_not_saved_yet_keeps_its_folder(tmp_path):
    with locked_run_dir(tmp_path, "train", ToyConfig(run_dir=tmp_path), ALONE):
        before = contents(tmp_path)
        with pytest.raises(RunFolderInUseError):
            claim(tmp_path, seed=3)
        assert contents(tmp_path) == before


def test_what_does_not_make_another_run_may_change(tmp_path):
    claim(tmp_path)
    claim(tmp_path, engine=Zero(stage=2), micro_batches=4, data_dir=Path("elsewhere"))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["engine"]["kind"] == "zero"


def test_a_damaged_description_is_not_overwritten(tmp_path):
    for text in ("{", "- a list"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=r"config\.yaml"):
            claim(tmp_path)
        assert (tmp_path / "config.yaml").read_text() == text


def test_two_jobs_cannot_work_in_one_folder(tmp_path):
    with locked_run_dir(tmp_path, "train", ToyConfig(), ALONE):
        assert f"process {os.getpid()}" in (holder(tmp_path) or "")
        with pytest.raises(RunFolderInUseError, match=f"in use by process {os.getpid()} on .* since") as caught:
            claim(tmp_path)
        assert caught.value.exit_code == 69
    assert holder(tmp_path) is None
    claim(tmp_path)


def test_a_dead_job_holds_no_lock(tmp_path):
    program = f"""
import time
from pathlib import Path
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.runs.stage import StageConfig
from tokscale.runs.run_folder import locked_run_dir
with locked_run_dir(Path({str(tmp_path)!r}), "train", StageConfig(), Comm(ProcessEnv())):
    print("claimed", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        with pytest.raises(RunFolderInUseError, match=f"process {process.pid} "):
            claim(tmp_path)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 120
    while holder(tmp_path) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    claim(tmp_path)  # another configuration, of which nothing was saved


def claim_on_two_ranks(comm: Comm, folder: Path) -> str:
    try:
        with locked_run_dir(folder, "train", ToyConfig(run_dir=folder, seed=3), comm):
            pass
    except RunFolderInUseError as error:
        return f"{error.exit_code} {error}"
    return "claimed"


def test_all_ranks_hear_of_a_refusal_and_begin_anew_where_nothing_was_saved(tmp_path):
    with locked_run_dir(tmp_path, "train", ToyConfig(run_dir=tmp_path), ALONE):
        for answer in run_ranks(claim_on_two_ranks, 2, tmp_path):
            assert answer.startswith("69 ") and "in use by process" in answer
    assert run_ranks(claim_on_two_ranks, 2, tmp_path) == ["claimed", "claimed"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["seed"] == 3
    assert len(list((tmp_path / "set_aside").iterdir())) == 1
    assert (tmp_path / "logs/rank_0001.log").exists()
