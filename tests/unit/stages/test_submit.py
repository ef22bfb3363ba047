"""Submitting a pipeline: the calls of `sbatch` with their dependencies, what is written, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tokscale import cli
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.package_data import package_data_path
from tokscale.stages.cluster import ClusterConfig
from tokscale.stages.submit import PIPELINE, SubmitConfig, batch_files, calls, script

ROOT = Path(__file__).parents[3]
SHELL = sorted([*(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "slurm/lib").glob("*.sh")])


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """An `sbatch` that numbers jobs from 101, refuses what `refuse` names, and keeps its arguments."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sbatch", "scancel"):
        (tools / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\n'
            f"refused=$(cat {tmp_path}/refuse 2>/dev/null)\n"
            'if [[ -n $refused && "$*" == *$refused* ]]; then echo no such partition >&2; exit 1; fi\n'
            f"echo $((100 + $(wc -l <{tmp_path}/calls)))\n"
        )
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path


def submit(folder: Path, *words: str) -> int:
    return cli.main(["submit", "recipe=debug/dalle", f"run_dir={folder}/run", "cluster=local", *words])


def made(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_every_stage_waits_for_the_one_before_and_reads_what_was_resolved(sbatch, capsys):
    assert submit(sbatch, "train.loop.total_steps=33", "tokenize_tasks=4", "after=50") == 0
    assert (
        "queued prepare 101, train-tokenizer 102, tokenize 103, tokenize-close 104, train 105"
        in capsys.readouterr().out
    )
    lines = made(sbatch)
    files = ("prepare", "train-tokenizer", "tokenize", "tokenize", "train", "export", "evaluate")
    for number, (stage, line) in enumerate(zip(files, lines, strict=True)):
        before = 50 if number == 0 else 100 + number
        assert f"--dependency=afterok:{before} --kill-on-invalid-dep=yes" in line
        assert f"slurm/{stage}.sbatch recipe=" in line
    assert "--array=0-3" in lines[2] and lines[2].endswith("recipe.yaml action=run")
    assert "--array=0-0" in lines[3] and lines[3].endswith("recipe.yaml")  # one process closes what many have made
    assert "--array" not in lines[4] and "--nodes=2" in lines[4]
    (folder,) = (sbatch / "run/submitted").iterdir()
    sections = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert list(sections) == list(PIPELINE) and sections["train"]["loop"]["total_steps"] == 33
    assert sections["train"]["run_dir"] == f"{sbatch}/run" and sections["train"]["model"]["kind"] == "dalle"
    assert json.loads((folder / "jobs.json").read_text())["evaluate"] == "107"
    assert json.loads((folder / "code.json").read_text())["versions"]["torch"]
    recipe = lines[3].rpartition("recipe=")[2]
    assert Path(recipe) == folder / "recipe.yaml"


def test_a_dry_run_prints_a_script_that_does_the_same(sbatch, capsys):
    assert submit(sbatch, "dry_run=true", "stages=[train,export]") == 0
    assert not made(sbatch) and not (sbatch / "run").exists()
    printed = capsys.readouterr().out
    program = printed[printed.index("#!/usr/bin/env bash") : printed.index("submit: would queue")]
    subprocess.run(["bash", "-c", program], check=True, cwd=sbatch)
    first, second = made(sbatch)
    assert "--dependency" not in first and "--dependency=afterok:101" in second
    assert "export TOKSCALE_PYTHON=" in program and "export OMP_NUM_THREADS=1" in program


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("stages=[trian]",), "did you mean 'train'"),
        (("train.loop.totl_steps=3",), "section train: loop.totl_steps: unknown key"),
        (("cluster.nodse=3",), "cluster.nodse: unknown key; did you mean 'nodes'?"),
        (("stages=[]",), "names no stage"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_is_queued(sbatch, words, named, capsys):
    assert submit(sbatch, *words) == 64
    assert named in capsys.readouterr().err and not made(sbatch) and not (sbatch / "run").exists()


def test_a_refused_job_takes_back_those_before_it(sbatch, capsys):
    (sbatch / "refuse").write_text("train.sbatch")
    assert submit(sbatch, "stages=[prepare,train]") == 69
    assert "sbatch refused train: no such partition" in capsys.readouterr().err
    assert made(sbatch)[-1] == "scancel 101"


def test_without_slurm_it_says_where_to_go(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit(tmp_path) == 69 and "submit from a login node" in capsys.readouterr().err


def test_a_cluster_as_flags_and_variables():
    cluster = decode(
        ClusterConfig,
        {
            "partition": "gpu",
            "cpu_partition": "cpu",
            "account": "a1",
            "nodes": 4,
            "gpu_flag": "--gres=gpu:h100:{count}",
            "time": {"train": "24:00:00"},
            "container": {"runtime": "pyxis", "image": "i.sqsh", "mounts": ["/a:/a", "/b:/b"]},
            "env": {"OMP_NUM_THREADS": 4},
            "flags": ["--exclusive"],
        },
    )
    flags = cluster.sbatch_flags("train")
    assert flags[:3] == ["--partition=gpu", "--account=a1", "--time=24:00:00"] and flags[-1] == "--exclusive"
    assert {"--nodes=4", "--ntasks-per-node=8", "--gres=gpu:h100:8", "--signal=USR1@180"} <= set(flags)
    assert "--gres=gpu:h100:1" in cluster.sbatch_flags("sample") and "--ntasks-per-node=1" in cluster.sbatch_flags(
        "sample"
    )
    export = cluster.sbatch_flags("export")
    assert "--partition=cpu" in export and not any("gpu" in flag for flag in export)
    assert cluster.variables() == {
        "TOKSCALE_MAX_RESTARTS": "100",
        "TOKSCALE_CONTAINER": "pyxis",
        "TOKSCALE_CONTAINER_IMAGE": "i.sqsh",
        "TOKSCALE_CONTAINER_MOUNTS": "/a:/a,/b:/b",
        "OMP_NUM_THREADS": "4",
    }
    with pytest.raises(ConfigError, match="runtime=pyxis needs an image"):
        decode(ClusterConfig, {"container": {"runtime": "pyxis"}})


@pytest.mark.parametrize("path", sorted((ROOT / "configs/cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_cluster_makes_calls(path):
    cluster = decode(ClusterConfig, yaml.safe_load(path.read_text()))
    config = SubmitConfig(cluster=cluster, stages=tuple(batch_files()), dry_run=True)
    subprocess.run(["bash", "-n", "-c", script(calls(config, Path("recipe.yaml")))], check=True)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_files_pass_shellcheck(path):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is missing: pip install 'tokscale[dev]'")
    told = subprocess.run([shellcheck, "-x", "-P", ROOT / "slurm/lib", path], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout


@pytest.mark.parametrize("path", batch_files().values(), ids=lambda path: path.name)
def test_batch_files_append_are_warned_and_may_come_again(path):
    text = path.read_text()
    for flag in ("--requeue", "--open-mode=append", "--signal=USR1@"):
        assert f"#SBATCH {flag}" in text
    assert f" {path.stem} " in text and len(text.splitlines()) <= 30


def run_library(tmp_path, program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    for name, answer in {
        "srun": 'echo "srun $*"; exit "${SRUN_CODE:-0}"',
        "scontrol": "echo JobState=${STATE:-RUNNING}; echo $* >>calls",
        "sleep": ":",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "TOKSCALE_MAX_RESTARTS": "2",
    }
    lib = package_data_path("slurm") / "lib"
    words = f"set -euo pipefail; source {lib}/launch.sh; source {lib}/restart.sh; {program}"
    return subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=env | environ, cwd=tmp_path)


@pytest.mark.parametrize(
    ("code", "environ", "again"),
    [
        ("137", {}, True),
        ("76", {}, True),
        ("137", {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, True),
        ("137", {"STATE": "CANCELLED"}, False),  # by a person: it must not come again
        ("137", {"SLURM_RESTART_COUNT": "2"}, False),
        ("75", {}, False),  # rank 0 has asked already
        ("65", {}, False),
    ],
)
def test_what_no_rank_can_ask_for_the_batch_script_does(tmp_path, code, environ, again):
    ended = run_library(tmp_path, "launch all train a=b || finish $?", SRUN_CODE=code, **environ)
    assert ended.returncode == int(code)
    asked = (
        [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("requeue")]
        if (tmp_path / "calls").exists()
        else []
    )
    assert asked == ([f"requeue {'5_3' if 'SLURM_ARRAY_JOB_ID' in environ else '7'}"] if again else [])


def test_one_task_for_each_rank_inside_the_container(tmp_path):
    environ = {"TOKSCALE_CONTAINER": "apptainer", "TOKSCALE_CONTAINER_IMAGE": "t.sif", "TOKSCALE_PYTHON": "python"}
    told = run_library(tmp_path, "launch all train 'a=b c'", **environ).stdout
    assert (
        "--kill-on-bad-exit=1" in told
        and "apptainer exec --nv" in told
        and "t.sif python -m tokscale train a=b c" in told
    )
    assert "--ntasks=1" in run_library(tmp_path, "launch one export").stdout
    assert run_library(tmp_path, ":", TOKSCALE_CONTAINER="docker").returncode == 64
