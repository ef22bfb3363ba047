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
from tokscale.runs.submitted import read_submissions
from tokscale.stages.cluster import ClusterConfig
from tokscale.stages.sbatch import sbatch_environ
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
        # The task that closes the data set looks at the whole: it comes whatever became of single workers.
        kind = "afterany" if number == 3 else "afterok"
        assert f"--dependency={kind}:{before} --kill-on-invalid-dep=yes" in line
        assert f"code/slurm/{stage}.sbatch settings=" in line
    assert "--array=0-3" in lines[2] and lines[2].endswith("recipe.yaml action=run")
    assert "--array=0-0" in lines[3] and lines[3].endswith("recipe.yaml")  # one process closes what many have made
    assert "--array" not in lines[4] and "--nodes=2" in lines[4]
    (folder,) = (sbatch / "run/submitted").iterdir()
    sections = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert list(sections) == list(PIPELINE) and sections["train"]["loop"]["total_steps"] == 33
    assert sections["train"]["run_dir"] == f"{sbatch}/run" and sections["train"]["model"]["kind"] == "dalle"
    assert json.loads((folder / "jobs.json").read_text())["jobs"][-1] == {"name": "evaluate", "job": "107", "tasks": 0}
    settings = (folder / "train.settings").read_text()
    assert f"export TOKSCALE_CODE={folder}/code\n" in settings and "export OMP_NUM_THREADS=1\n" in settings
    assert json.loads((folder / "code.json").read_text())["versions"]["torch"]
    recipe = lines[3].rpartition("recipe=")[2]
    assert Path(recipe) == folder / "recipe.yaml"


def test_a_dry_run_prints_a_script_that_does_the_same(sbatch, capsys):
    assert submit(sbatch, "dry_run=true", "stages=[train,export]", "train.loop.total_steps=7") == 0
    assert not made(sbatch) and not (sbatch / "run").exists()
    program = capsys.readouterr().out  # nothing else goes there
    told = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=sbatch)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    (scripted,) = (sbatch / "run/submitted").iterdir()
    first, second = made(sbatch)
    assert "--dependency" not in first and "--dependency=afterok:101" in second
    sections = yaml.safe_load((scripted / "recipe.yaml").read_text())
    assert sections["train"]["loop"]["total_steps"] == 7
    assert [job.job for job in read_submissions(sbatch / "run")[-1].jobs] == ["101", "102"]
    # What the stage itself would have left, but for what it knows of this process.
    shutil.move(sbatch / "run", sbatch / "scripted")
    assert submit(sbatch, "stages=[train,export]", "train.loop.total_steps=7") == 0
    (queued,) = (sbatch / "run/submitted").iterdir()
    scripted = sbatch / "scripted/submitted" / scripted.name
    names = lambda folder: {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}  # noqa: E731
    beside = {"code.json", "changes.patch"}
    assert {p for p in names(queued) if p.name not in beside} == {p for p in names(scripted) if p.name not in beside}
    for name in ("recipe.yaml", "train.settings", "export.settings", "command.txt", "code/commit.txt"):
        assert (queued / name).read_text().replace(queued.name, "") == (scripted / name).read_text().replace(
            scripted.name, ""
        ).replace(f"{sbatch}/scripted", f"{sbatch}/run")
    assert (sbatch / "scripted/logs").is_dir()


def test_jobs_run_the_code_as_it_was_at_submission(sbatch):
    assert submit(sbatch, "stages=[train]") == 0
    (folder,) = (sbatch / "run/submitted").iterdir()
    asked = "import tokscale, tokscale.base.package_data as p; print(tokscale.__file__, p.package_data_path('configs'))"
    environ = os.environ | {"PYTHONPATH": str(folder / "code")}
    told = subprocess.run([sys.executable, "-P", "-c", asked], capture_output=True, text=True, env=environ, cwd=ROOT)
    assert told.stdout.split() == [f"{folder}/code/tokscale/__init__.py", f"{folder}/code/configs"], told.stderr
    assert not list((folder / "code").rglob("__pycache__"))
    assert "code/slurm/train.sbatch" in made(sbatch)[0]
    assert submit(sbatch, "stages=[train]", "code=live") == 0
    assert f" {ROOT}/slurm/train.sbatch" in made(sbatch)[1]


def test_a_folder_named_as_slurms_patterns_stays_what_it_is(sbatch):
    assert cli.main(["submit", "recipe=debug/dalle", f"run_dir={sbatch}/50%j", "cluster=local", "stages=[train]"]) == 0
    assert f"--output={sbatch}/50%%j/logs/slurm-train-%j.log" in made(sbatch)[0]


def test_two_submissions_in_one_second_are_two(sbatch, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20260101_120000")
    assert [submit(sbatch, "stages=[train]"), submit(sbatch, "stages=[export]")] == [0, 0]
    first, second = read_submissions(sbatch / "run")
    assert [job.name for job in (*first.jobs, *second.jobs)] == ["train", "export"]
    assert f"{second.folder}/export.settings" in made(sbatch)[1]


def test_a_batch_that_the_ranks_do_not_divide_is_refused(sbatch, capsys):
    assert submit(sbatch, "train.batch_size=33") == 64
    assert "section train: batch_size=33 does not divide into 2 ranks" in capsys.readouterr().err
    assert not made(sbatch)


def test_only_what_was_lost_is_queued_again(sbatch, capsys):
    answers = sbatch / "tools/squeue"
    assert submit(sbatch, "stages=[tokenize,train,export]") == 0  # jobs 101 to 104
    answers.write_text(
        "#!/bin/bash\nprintf '101|101|COMPLETED|None|n1\\n102|102|FAILED|NonZeroExitCode|n1\\n"
        "103|103|CANCELLED|DependencyNeverSatisfied|\\n104|104|CANCELLED|DependencyNeverSatisfied|\\n'\n"
    )
    answers.chmod(0o755)
    assert cli.main(["status", f"run_dir={sbatch}/run"]) == 0
    told = capsys.readouterr().out
    assert "job 102 tokenize-close: failed (ended with a code above 0; the log says why) on n1" in told
    assert "job 103 train: cancelled (the job before it did not end well)" in told
    assert "to queue what is missing (tokenize, train, export): tokscale " in told and "action=missing" in told
    assert submit(sbatch, "stages=[evaluate]") == 0
    assert "not queued again: tokenize-close 102 (failed), train 103 (cancelled), export 104" in capsys.readouterr().out
    shutil.rmtree(sorted((sbatch / "run/submitted").iterdir())[-1])
    before = len(made(sbatch))
    assert submit(sbatch, "action=missing") == 0
    assert [line.rpartition("code/slurm/")[2].split()[0] for line in made(sbatch)[before:]] == [
        "tokenize.sbatch",
        "tokenize.sbatch",
        "train.sbatch",
        "export.sbatch",
    ]
    answers.write_text("#!/bin/bash\necho '105|105|RUNNING|None|n1'\n")


def answers(folder: Path, *lines: str) -> None:
    """What `squeue` says from now on, of `job|state|reason`."""
    said = "".join(f"{job}|{job}|{state}|{reason}|n1\\n" for job, state, reason in (line.split("|") for line in lines))
    (folder / "tools/squeue").write_text(f"#!/bin/bash\nprintf '{said}'\n")
    (folder / "tools/squeue").chmod(0o755)


def test_what_is_missing_is_exactly_what_was_lost_and_waits_for_what_lives(sbatch, capsys):
    assert submit(sbatch, "stages=[tokenize,train,export,evaluate]") == 0  # jobs 101 to 105
    # A worker failed, but the task that looks at the whole was content; train was cancelled, export ran by itself.
    answers(
        sbatch, "101|FAILED|None", "102|RUNNING|None", "103|CANCELLED|None", "104|COMPLETED|None", "105|FAILED|None"
    )
    assert cli.main(["status", f"run_dir={sbatch}/run"]) == 0
    assert "to queue what is missing (train, evaluate): tokscale " in capsys.readouterr().out
    before = len(made(sbatch))
    assert submit(sbatch, "action=missing", "stages=[export]") == 64  # it ended well
    assert "of stages=export none is missing; train, evaluate is" in capsys.readouterr().err
    assert submit(sbatch, "action=missing", "stages=[evaluate]", "dry_run=true") == 0
    assert "evaluate.sbatch" in (told := capsys.readouterr().out) and "train.sbatch settings" not in told
    assert submit(sbatch, "action=missing") == 0
    first, second = made(sbatch)[before:]
    assert "train.sbatch" in first and "--dependency=afterok:102 " in first
    assert "evaluate.sbatch" in second and "--dependency=afterok:106 " in second
    # The new jobs stand for the lost ones.
    answers(sbatch, "102|RUNNING|None", "104|COMPLETED|None", "106|PENDING|Dependency", "107|PENDING|Dependency")
    capsys.readouterr()
    assert submit(sbatch, "action=missing") == 64
    assert "train 106 (pending), evaluate 107 (pending) may still do so" in capsys.readouterr().err


def test_a_stage_that_no_pipeline_has_by_itself_is_missing_with_its_section(sbatch, capsys):
    assert submit(sbatch, "stages=[sample]", "sample.batch_size=3") == 0
    answers(sbatch, "101|FAILED|None")
    assert submit(sbatch, "action=missing", "sample.batch_size=3") == 0
    sections = [yaml.safe_load((each.folder / "recipe.yaml").read_text()) for each in read_submissions(sbatch / "run")]
    assert sections[0]["sample"] == sections[1]["sample"] and sections[1]["sample"]["batch_size"] == 3


def test_status_says_why_a_job_ended_and_why_it_came_again(sbatch, capsys):
    assert submit(sbatch, "stages=[train,export]") == 0
    (folder,) = (sbatch / "run/submitted").iterdir()
    (folder / "state").mkdir()
    (folder / "state/101.starts").write_text("started\npreempted\nstarted\nfailed\nstarted\n")
    (folder / "state/102.why").write_text("a rank was killed for want of memory; ask for more (cluster.memory)\n")
    answers(sbatch, "101|RUNNING|None", "102|FAILED|NonZeroExitCode")
    assert cli.main(["status", f"run_dir={sbatch}/run"]) == 0
    told = capsys.readouterr().out
    assert "job 101 train: running on n1, started again after: preempted, failed\n" in told
    assert "job 102 export: failed (a rank was killed for want of memory; ask for more (cluster.memory)) on n1" in told
    answers(sbatch, "101|PENDING|JobHeldUser", "102|PENDING|ReqNodeNotAvail, UnavailableNodes:n[1-3]")
    assert cli.main(["status", f"run_dir={sbatch}/run"]) == 0
    told = capsys.readouterr().out
    assert "held; `scontrol release 101` lets it go" in told
    assert "waits for nodes that are down, drained or reserved (ReqNodeNotAvail, UnavailableNodes:n[1-3])" in told


def test_what_became_of_jobs_that_the_scheduler_has_forgotten(sbatch, capsys):
    """As where there is no accounting: the run folder says how they ended, or that they never began."""
    assert submit(sbatch, "stages=[train,export,evaluate]") == 0
    (folder,) = (sbatch / "run/submitted").iterdir()
    (folder / "state").mkdir()
    (folder / "state/101.why").write_text("a rank ended with 1 and could not say why\n")
    (sbatch / "run/logs/slurm-export-102.log").touch()
    for name in ("squeue", "scontrol"):
        (sbatch / "tools" / name).write_text("#!/bin/bash\necho 'Invalid job id specified' >&2; exit 1\n")
        (sbatch / "tools" / name).chmod(0o755)
    assert cli.main(["status", f"run_dir={sbatch}/run"]) == 0
    told = capsys.readouterr().out
    assert "job 101 train: failed (a rank ended with 1 and could not say why)\n" in told
    assert f"job 102 export: failed (its log is {sbatch}/run/logs/slurm-export-102.log)\n" in told
    assert "job 103 evaluate: never began (it was cancelled, or the job before it did not end well;" in told
    assert "to queue what is missing (train, export, evaluate): " in told


def test_where_no_scheduler_answers_nothing_is_said_to_be_lost(sbatch, capsys, monkeypatch):
    assert submit(sbatch, "stages=[train,export]") == 0
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["status", f"run_dir={sbatch}/run"]) == 0
    told = capsys.readouterr().out
    assert "2 job(s) were submitted; the scheduler cannot be asked here" in told and "missing" not in told
    assert submit(sbatch, "action=missing") == 69
    assert "submit from a login node" in capsys.readouterr().err


def test_states_of_a_text_encoder_are_stored_between_tokens_and_training(sbatch):
    assert submit(sbatch, "stages=[tokenize,embed,train]", "tokenize.text_encoder=/t5", "tokenize_tasks=3") == 0
    _, _, embed, close, train = made(sbatch)
    assert "tokenize.sbatch" in embed and embed.endswith("action=embed") and "--array=0-2" in embed
    assert "--dependency=afterok:102" in embed and "--job-name=tokscale-embed" in embed
    # A worker that is cancelled or fails is not the end: one task comes afterwards, and makes what is missing.
    assert "--dependency=afterany:103" in close and close.endswith("action=embed") and "--array=0-0" in close
    assert "--dependency=afterok:104" in train
    (folder,) = (sbatch / "run/submitted").iterdir()
    sections = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert set(sections) == {"tokenize", "train"} and sections["tokenize"]["text_encoder"] == "/t5"


def test_nothing_is_missing_where_nothing_failed(sbatch, capsys):
    assert submit(sbatch, "action=missing") == 64
    assert "nothing was submitted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("stages=[trian]",), "did you mean 'train'"),
        (("train.loop.totl_steps=3",), "section train: loop.totl_steps: unknown key"),
        (("cluster.nodse=3",), "cluster.nodse: unknown key; did you mean 'nodes'?"),
        (("stages=[]",), "names no stage"),
        (("action=check", "dry_run=true"), "dry_run=true: action=check queues nothing but jobs of a minute"),
        (("cluster.stages.trian.qos=a",), "no stage 'trian' is submitted; did you mean 'train'?"),
        (("cluster.stages.train.tme=1",), "cluster.stages.train.tme: unknown key; did you mean 'time'?"),
        (("+cluster.gpu_flag='--gres=gpu:{n}'",), "only {count} is filled in"),
        (("cluster.stages.train.memory=lots",), "'lots' is no amount of memory"),
        (("cluster.flags=[exclusive]",), "'exclusive' is no flag of sbatch"),
        (("cluster.flags=['--partition gpu']",), "write --partition=gpu"),
        (
            ("cluster.flags=['--gres=gpu:1']", "cluster.gpus_per_node=2"),
            "contradicts gpu_flag='--gpus-per-node={count}'",
        ),
        (("cluster.time=24h",), "'24h' is no time limit"),
        (("cluster.interface=^lo",), "gloo knows no patterns"),
        (("cluster.container={runtime: command}",), "runtime=command needs a command"),
        (("cluster.container={runtime: pyxis, image: a, mounts: [shared]}",), "'shared' is no mount"),
        # Nothing is taken that would not be done.
        (("cluster.stages.sample.nodes=2",), "sample: has one task a job"),
        (("cluster.stages.export.tasks_per_node=8",), "are of train and train-tokenizer"),
        (("cluster.stages.train.at_once=2",), "train: is no array; at_once is of tokenize and embed"),
        (("cluster.gpus_per_node=8", "cluster.tasks_per_node=4"), "give stages.train.tasks_per_node"),
        (("cluster.environment=/shared/env.sif",), "is an image; container.runtime=none runs none"),
        (("cluster.environment=/shared/env.zip",), "is none of .tar, .tar.gz"),
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


def test_a_cluster_as_flags_and_settings():
    cluster = decode(
        ClusterConfig,
        {
            "partition": "gpu",
            "cpu": {"partition": "cpu"},
            "account": "a1",
            "nodes": 4,
            "memory": "800G",
            "gpu_flag": "--gres=gpu:h100:{count}",
            "stages": {
                "train": {"time": "24:00:00", "reservation": "r", "constraint": "ib"},
                "tokenize": {"at_once": 4, "cpus_per_task": 3, "max_failures": 7},
            },
            "container": {"runtime": "pyxis", "image": "i.sqsh", "mounts": ["/a:/a", "/b:/b"]},
            "env": {"OMP_NUM_THREADS": 4},
            "interface": "ib0",
            "flags": ["--comment=x"],
        },
    )
    flags = cluster.sbatch_flags("train")
    assert {"--partition=gpu", "--account=a1", "--time=24:00:00", "--reservation=r", "--constraint=ib"} <= set(flags)
    assert {"--nodes=4", "--ntasks-per-node=8", "--gres=gpu:h100:8", "--signal=USR1@180", "--exclusive"} <= set(flags)
    assert "--mem=800G" in flags and flags[-1] == "--comment=x"
    sample = cluster.sbatch_flags("sample")
    assert {"--gres=gpu:h100:1", "--ntasks-per-node=1", "--mem=102400M"} <= set(sample) and "--exclusive" not in sample
    assert {"--array=0-15%4", "--cpus-per-task=3"} <= set(cluster.sbatch_flags("tokenize", 16))
    for stage in ("export", "prepare", "tokenize-close"):
        wanted = cluster.sbatch_flags(stage)
        assert "--partition=cpu" in wanted and not any("gpu" in flag or "--mem" in flag for flag in wanted)
    assert cluster.settings("tokenize") == {
        "TOKSCALE_MAX_PREEMPTIONS": "1000",
        "TOKSCALE_MAX_FAILURES": "7",
        "TOKSCALE_MAX_BAD_NODES": "10",
        "TOKSCALE_SIGNAL_SECONDS": "180",
        "TOKSCALE_CONTAINER": "pyxis",
        "TOKSCALE_CONTAINER_IMAGE": "i.sqsh",
        "TOKSCALE_CONTAINER_MOUNTS": "/a:/a,/b:/b",
        "TOKSCALE_INTERFACE": "ib0",
        "OMP_NUM_THREADS": "4",
    }
    assert cluster.settings("train")["TOKSCALE_MAX_FAILURES"] == "20"
    with pytest.raises(ConfigError, match="runtime=pyxis needs an image"):
        decode(ClusterConfig, {"container": {"runtime": "pyxis"}})


def test_whole_nodes_have_all_their_memory_unless_told_otherwise():
    assert "--mem=0" in ClusterConfig().sbatch_flags("train")
    assert not any(flag.startswith("--mem") for flag in ClusterConfig().sbatch_flags("tokenize"))
    assert not any(flag.startswith("--mem") for flag in ClusterConfig(gpus_per_node=0).sbatch_flags("train"))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("3", 45), ("3:20", 50), ("0:04:00", 60), ("0-0:10", 150), ("1-00", 180), ("0-1:0:0", 180), ("INFINITE", 180)],
)
def test_a_short_job_is_not_warned_as_soon_as_it_starts(time, seconds):
    """A job that is warned before it has done anything would come again for ever, a step each time."""
    cluster = decode(ClusterConfig, {"stages": {"train": {"time": time}}})
    assert f"--signal=USR1@{seconds}" in cluster.sbatch_flags("train")
    assert "--signal=USR1@180" in cluster.sbatch_flags("export")


def test_a_time_that_yaml_took_for_a_number_is_explained():
    with pytest.raises(ConfigError, match='write "24:00:00" in quotes'):
        decode(ClusterConfig, yaml.safe_load("stages: {train: {time: 24:00:00}}"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_cluster_makes_calls(path):
    cluster = decode(ClusterConfig, yaml.safe_load(path.read_text()))
    config = SubmitConfig(cluster=cluster, stages=tuple(batch_files()), dry_run=True)
    folder = Path("/shared/run/submitted/now")
    subprocess.run(["bash", "-n", "-c", script(config, calls(config, folder), folder, "a: 1\n")], check=True)


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
        "srun": 'echo "srun $*"; [[ -z ${JOINED:-} ]] || touch "$TOKSCALE_OUTCOME.joined"\n'
        '[[ -z ${LINE:-} ]] || echo "$LINE" >"$TOKSCALE_OUTCOME"\n'
        '[[ -z ${SAYS:-} ]] || echo "$SAYS" >&2; exit "${CODE:-0}"',
        "scontrol": 'echo "JobId=7 JobState=${STATE:-RUNNING} ExcNodeList=${EXCLUDED:-(null)}'
        ' EndTime=2030-01-01T00:00:00 StartTime=2026-01-01T00:00:00 PreemptTime=${PREEMPTED:+2026-01-01T00:05:00}"\n'
        "echo $* >>calls",
        "squeue": "printf '%s\\n' ${QUEUE:-7}",
        "sleep": ":",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "TOKSCALE_MAX_FAILURES": "2",
        "TOKSCALE_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
        "UID": "0",
    }
    lib = package_data_path("slurm") / "lib"
    words = f"set -euo pipefail; source {lib}/job.sh; {program}"
    return subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=env | environ, cwd=tmp_path)


def asked(tmp_path) -> list[str]:
    path = tmp_path / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(("requeue", "update"))]


@pytest.mark.parametrize(
    ("code", "environ", "again"),
    [
        # What the stage says counts, not the highest code of a rank.
        ("75", {"LINE": "train 7.0 75 yes"}, True),
        ("137", {"LINE": "train 7.0 76 yes"}, True),
        ("137", {"LINE": "train 7.0 1 no"}, False),  # memory ran out on one rank, and the other was ended
        ("75", {"LINE": "train 7.0 75 no"}, False),
        ("65", {"LINE": "train 7.0 65 no"}, False),
        # A rank that was killed can say nothing.
        ("137", {"LINE": "train 7.0 - -", "JOINED": "1"}, True),
        ("139", {"LINE": "train 7.0 - -", "JOINED": "1"}, True),
        ("1", {"LINE": "train 7.0 - -", "JOINED": "1"}, False),
        ("137", {"LINE": "train 7.0 - -", "JOINED": "1", "SAYS": "Detected 1 oom_kill event"}, False),
        ("137", {"LINE": "train 7.0 - -", "JOINED": "1", "SAYS": "srun: error: n2: task 1: Out Of Memory"}, False),
        ("137", {"LINE": "train 7.0 - -", "JOINED": "1", "SAYS": "1: slurmstepd: error: Detected 1 oom-kill"}, False),
        (
            "137",
            {"LINE": "train 7.0 - -", "JOINED": "1", "SAYS": "0: dropped a batch, out of memory"},
            True,
        ),  # a rank's
        # Preempted in the time of grace, at whatever point.
        ("143", {"PREEMPTED": "1", "SLURM_RESTART_COUNT": "9"}, True),
        ("143", {"PREEMPTED": "1", "LINE": "train 7.0 - -", "JOINED": "1", "TOKSCALE_MAX_FAILURES": "0"}, True),
        ("143", {"LINE": "train 7.0 - -", "JOINED": "1", "TOKSCALE_MAX_FAILURES": "0"}, False),
        # Before all ranks have met, a kill may be the machine's fault; a crash, an image, an interpreter is not.
        ("137", {}, True),
        ("139", {}, False),
        ("134", {}, False),
        ("255", {}, False),
        ("127", {}, False),
        # Not on our account.
        ("137", {"JOINED": "1", "LINE": "train 7.0 - -", "STATE": "CANCELLED"}, False),
        ("75", {"LINE": "train 7.0 75 yes", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, True),
    ],
)
def test_why_a_job_ended_decides_whether_it_comes_again(tmp_path, code, environ, again):
    ended = run_library(tmp_path, "run_stage all train a=b", CODE=code, **environ)
    said = environ.get("LINE", "- - - -").split()[2]
    assert ended.returncode == int(code if said == "-" else said), ended.stdout + ended.stderr
    name = "5_3" if "SLURM_ARRAY_JOB_ID" in environ else "7"
    assert asked(tmp_path) == ([f"requeue {name}"] if again else []), ended.stdout
    assert ("== not requeued: " in ended.stdout) == (not again)


def test_reasons_are_counted_apart_each_with_its_limit(tmp_path):
    again = {"SLURM_RESTART_COUNT": "1"}
    killed = {"CODE": "137", "LINE": "train 7.0 - -", "JOINED": "1", **again}
    stopped = {"CODE": "75", "LINE": "train 7.0 75 yes", **again}
    for environ in (killed, stopped, stopped, killed, stopped):
        run_library(tmp_path, "run_stage all train", **environ)
    assert len(asked(tmp_path)) == 5
    ended = run_library(tmp_path, "run_stage all train", **killed)
    assert "this was number 3 of failed, at most 2 are allowed" in ended.stdout and len(asked(tmp_path)) == 5
    for _ in range(5):
        run_library(tmp_path, "run_stage all train", CODE="137", **again)
    assert len(asked(tmp_path)) == 5 + 3  # what never starts is stopped after three
    # Another job of that number, of another cluster or long ago: what befell it is none of this one's.
    run_library(tmp_path, "run_stage all train", **killed | {"SLURM_RESTART_COUNT": "0"})
    assert len(asked(tmp_path)) == 5 + 3 + 1


def test_a_controller_that_is_too_busy_to_answer_is_asked_again(tmp_path):
    scontrol = 'scontrol() { if [[ -e busy ]] && lacks 4; then echo >>busy; return 1; fi; command scontrol "$@"; }'
    stopped = 'launch() { echo >busy; echo "train 7.0 75 yes" >"$TOKSCALE_OUTCOME"; return 75; }'
    program = f"lacks() {{ (($(wc -l <busy) < $1)); }}; {scontrol}; {stopped}; run_stage all train"
    ended = run_library(tmp_path, program)
    assert ended.returncode == 75 and asked(tmp_path) == ["requeue 7"], ended.stdout


def test_what_slurm_puts_back_itself_is_counted_when_the_job_comes_again(tmp_path):
    starts = tmp_path / ".tokscale-jobs/7.starts"
    starts.parent.mkdir()
    starts.write_text("started\n")  # the batch script ended with its node
    run_library(tmp_path, "run_stage all train", CODE="1", SLURM_RESTART_COUNT="1")
    assert starts.read_text().split() == ["started", "preempted", "started", "ended"]


def test_nodes_that_preflight_refused_are_left_out(tmp_path):
    run_library(tmp_path, "run_stage all train", CODE="69", LINE="train 7.0 69 yes n1,n4")
    assert asked(tmp_path) == ["requeue 7", "update JobId=7 ExcNodeList=n1,n4"]


def test_slow_nodes_are_left_out_of_a_preempted_job_within_the_limit(tmp_path):
    slow = {"CODE": "75", "LINE": "train 7.0 75 yes n2", "EXCLUDED": "n9", "TOKSCALE_MAX_BAD_NODES": "1"}
    slow |= {"SLURM_RESTART_COUNT": "1"}
    run_library(tmp_path, "run_stage all train", **slow)
    assert asked(tmp_path) == ["requeue 7", "update JobId=7 ExcNodeList=n2,n9"]
    told = run_library(tmp_path, "run_stage all train", **slow | {"LINE": "train 7.0 75 yes n3"}).stdout
    assert asked(tmp_path)[2:] == ["requeue 7"]  # only slow: it comes again all the same
    assert "n3 stay: cluster.max_bad_nodes=1 are left out already" in told


def test_nodes_that_nothing_can_take_the_place_of_stay(tmp_path):
    (tmp_path / "sinfo").write_text("#!/bin/bash\nprintf 'n1 mix\\nn2 idle\\nn3 drain\\n'\n")
    (tmp_path / "sinfo").chmod(0o755)
    names = 'scontrol() { if [[ $1$2 == showhostnames ]]; then tr , "\\n" <<<"$3"; else command scontrol "$@"; fi; }'
    run = f"{names}; run_stage all train"
    two = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,n2"}
    bad = {"CODE": "69", "LINE": "train 7.0 69 yes n1"}
    told = run_library(tmp_path, run, **two, **bad).stdout
    assert "not requeued: without n1, the partition  has only 1 nodes beside them" in told and not asked(tmp_path)
    told = run_library(tmp_path, run, **bad).stdout  # one node is enough, and n2 is there
    assert asked(tmp_path) == ["requeue 7", "update JobId=7 ExcNodeList=n1"], told


def test_one_task_for_each_rank_inside_the_container(tmp_path):
    (tmp_path / "t.sif").touch()
    environ = {"TOKSCALE_CONTAINER": "apptainer", "TOKSCALE_CONTAINER_IMAGE": f"{tmp_path}/t.sif"}
    told = run_library(tmp_path, "run_stage all train 'a=b c'", TOKSCALE_PYTHON="python", **environ).stdout
    assert "--kill-on-bad-exit=1" in told and "apptainer exec --nv" in told
    assert "t.sif python -m tokscale train a=b c" in told
    assert "--ntasks=1" in run_library(tmp_path, "run_stage one export").stdout
    assert run_library(tmp_path, "run_stage all train", TOKSCALE_CONTAINER="docker").returncode == 64
    missing = run_library(tmp_path, "run_stage all train", **environ | {"TOKSCALE_CONTAINER_IMAGE": "/nowhere.sif"})
    assert missing.returncode == 69 and "/nowhere.sif is not there" in missing.stderr


def test_what_the_job_sets_wins_over_what_an_image_sets(tmp_path):
    (tmp_path / "settings").write_text("export DS_ACCELERATOR=cpu\nexport SITE='a b'\n")
    image = {"TOKSCALE_CONTAINER": "pyxis", "TOKSCALE_CONTAINER_IMAGE": "r#i:t", "TOKSCALE_CODE": "/code"}
    program = 'run_stage all train "settings=settings"'
    told = run_library(tmp_path, program, TOKSCALE_CONTAINER_FLAGS="--no-container-mount-home", **image).stdout
    (call,) = (line for line in told.splitlines() if line.startswith("srun --kill"))
    assert "--container-image=r#i:t" in call and "--no-container-mount-home env " in call
    assert (
        " SITE=a b " in call and " TOKSCALE_LAUNCHER=srun " in call and "sh /code python -P -m tokscale train" in call
    )
    # In front of what the image has on its own path.
    words = ["TOKSCALE_CONTAINER=command", "TOKSCALE_CONTAINER_COMMAND=env 'SITE=im age' PYTHONPATH=/image"]
    (tmp_path / "python").write_text('#!/bin/bash\necho "$SITE|$PYTHONPATH"\n')
    (tmp_path / "python").chmod(0o755)
    run = f'srun() {{ while [[ $1 == --* ]]; do shift; done; "$@"; }}; {program}'
    environ = dict(word.split("=", 1) for word in words) | {"TOKSCALE_CODE": "/code"}
    assert "a b|/code:/image" in run_library(tmp_path, run, **environ).stdout
    for runtime in ("apptainer", "singularity"):
        show = f"srun() {{ env; }}; {program}"
        told = run_library(tmp_path, show, TOKSCALE_CONTAINER=runtime, TOKSCALE_CONTAINER_IMAGE="i.sif").stdout
        assert f"{runtime.upper()}ENV_SITE=a b\n" in told and f"{runtime.upper()}ENV_DS_ACCELERATOR=cpu\n" in told


def test_what_the_submitting_shell_was_a_part_of_does_not_leak_in(tmp_path):
    of_launchers = (
        "RANK NODE_RANK ROLE_WORLD_SIZE OMPI_COMM_WORLD_RANK PMI_RANK PMIX_RANK TORCHELASTIC_RUN_ID MASTER_PORT"
    )
    of_slurm = "SLURM_CPU_BIND SLURM_CPU_BIND_LIST SQUEUE_STATES SLURM_TIME_FORMAT MPI_LOCALRANKID CUDA_VISIBLE_DEVICES"
    names = f"{of_launchers} {of_slurm}".split()
    told = run_library(tmp_path, "srun() { env; }; run_stage all train", **dict.fromkeys(names, "3")).stdout
    assert [name for name in names if f"\n{name}=" in told] == [] and "\nTOKSCALE_JOB=7\n" in told


def test_devices_that_slurm_gave_stay(tmp_path):
    environ = {"CUDA_VISIBLE_DEVICES": "3", "SLURM_JOB_GPUS": "3"}
    assert (
        "\nCUDA_VISIBLE_DEVICES=3\n" in run_library(tmp_path, "srun() { env; }; run_stage all train", **environ).stdout
    )


def test_a_shell_inside_an_allocation_lends_no_limits_to_new_jobs():
    given = {"SLURM_CONF": "/c", "SLURM_MEM_PER_CPU": "5", "SLURM_JOB_ID": "3", "SBATCH_ACCOUNT": "a", "HOME": "/h"}
    assert sbatch_environ(given) == {"SLURM_CONF": "/c", "SBATCH_ACCOUNT": "a", "HOME": "/h"}


def test_habits_of_a_person_add_no_gpus_and_undo_nothing_of_the_batch_files():
    names = ("GPUS", "GPUS_PER_NODE", "GRES", "ARRAY_INX", "NO_REQUEUE", "OPEN_MODE", "SIGNAL", "WAIT", "MEM_PER_CPU")
    kept = {f"SBATCH_{name}": "x" for name in ("PARTITION", "QOS", "RESERVATION", "EXPORT", "CONSTRAINT", "TIMELIMIT")}
    assert sbatch_environ({f"SBATCH_{name}": "1" for name in names} | kept) == kept


def test_settings_come_from_a_file_and_other_launchers_are_forgotten(tmp_path):
    (tmp_path / "a b.settings").write_text("export TOKSCALE_INTERFACE=ib0\nexport TOKSCALE_PYTHON='p y'\n")
    program = 'run_stage all train "settings=a b.settings" x=1; env'
    told = run_library(tmp_path, f'srun() {{ env; echo "$*"; }}; {program}', RANK="3", MASTER_ADDR="localhost").stdout
    assert "GLOO_SOCKET_IFNAME=ib0" in told and "NCCL_SOCKET_IFNAME=ib0" in told and "p y -m tokscale train x=1" in told
    assert "\nRANK=" not in told and "\nMASTER_ADDR=" not in told and "TOKSCALE_MASTER_PORT=12217" in told
    (tmp_path / "a b.settings").write_text("export NCCL_SOCKET_IFNAME=^lo\nexport TOKSCALE_INTERFACE=ib0\n")
    told = run_library(tmp_path, f"srun() {{ env; }}; {program}", GLOO_SOCKET_IFNAME="eth9").stdout
    assert "\nGLOO_SOCKET_IFNAME=ib0\n" in told and "\nNCCL_SOCKET_IFNAME=^lo\n" in told  # the file has the word


def test_a_packed_environment_is_unpacked_once_on_a_node(tmp_path):
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/bin/python").write_text("#!/bin/bash\necho packed $*\n")
    (tmp_path / "env/bin/python").chmod(0o755)
    subprocess.run(["tar", "-C", tmp_path / "env", "-czf", tmp_path / "env.tar.gz", "."], check=True)
    run = 'srun() { while [[ $1 == --* ]]; do shift; done; "$@"; }; run_stage all train x=1'
    for _ in range(2):
        told = run_library(tmp_path, run, TOKSCALE_ENVIRONMENT=str(tmp_path / "env.tar.gz"))
        assert "packed -m tokscale train x=1" in told.stdout, told.stderr
    (unpacked,) = (tmp_path / "cache").glob("tokscale-*/environments/*.complete")
    unpacked.unlink()  # as a job leaves it that was killed while unpacking
    assert "packed" in run_library(tmp_path, run, TOKSCALE_ENVIRONMENT=str(tmp_path / "env.tar.gz")).stdout
    assert unpacked.exists()
    assert len(list(unpacked.parent.iterdir())) == 3  # it stays when the job is over: the folder, its mark, its lock
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    assert run_library(tmp_path, run, TOKSCALE_ENVIRONMENT=str(tmp_path / "bad.tar")).returncode == 69


RUNS_TASKS = (
    'srun() { while [[ $1 == --* ]]; do shift; done; [[ $1 == python ]] || "$@"; }; timeout() { shift; "$@"; }; '
)


def caches(tmp_path) -> list[str]:
    return sorted(str(path.relative_to(path.parents[2])) for path in tmp_path.glob("cache/tokscale-*/*/users/*"))


def test_the_last_job_that_used_a_nodes_cache_removes_it(tmp_path):
    """Jobs of one version of the code share it; who comes again finds it."""
    stopped = 'launch() { echo "train 7.0 75 yes" >"$TOKSCALE_OUTCOME"; return 75; }; '
    version = {"TOKSCALE_CODE_VERSION": "abc"}
    run_library(tmp_path, f"{RUNS_TASKS} {stopped} run_stage all train", **version)
    assert asked(tmp_path) == ["requeue 7"] and caches(tmp_path) == ["abc/users/7"]
    (cache,) = tmp_path.glob("cache/tokscale-*/abc")
    (cache / "users/8").touch()
    (cache / "triton").mkdir()
    told = run_library(tmp_path, f"{RUNS_TASKS} run_stage all train", QUEUE="7 8", **version)
    assert told.returncode == 0 and caches(tmp_path) == ["abc/users/8"] and (cache / "triton").is_dir(), told.stderr
    told = run_library(tmp_path, f"{RUNS_TASKS} run_stage all train", QUEUE="7", **version)  # 8 was killed
    assert told.returncode == 0 and not cache.exists() and not list(cache.parent.glob(".gone*")), told.stderr


def test_a_task_of_an_array_leaves_the_cache_to_the_others(tmp_path):
    task = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "TOKSCALE_CODE_VERSION": "abc"}
    run_library(tmp_path, f"{RUNS_TASKS} run_stage one tokenize", QUEUE="5 5 5", **task)
    assert caches(tmp_path) == ["abc/users/5"]
    run_library(tmp_path, f"squeue() {{ return 1; }}; {RUNS_TASKS} run_stage one tokenize", **task)
    assert caches(tmp_path) == ["abc/users/5"]  # nobody says whether others are left
    run_library(tmp_path, f"{RUNS_TASKS} run_stage one tokenize", QUEUE="5", **task)
    assert caches(tmp_path) == []


def test_caches_of_jobs_that_ended_without_a_word_are_removed_by_the_next(tmp_path):
    run_library(tmp_path, f"{RUNS_TASKS} leave_nodes() {{ :; }}; run_stage all train", TOKSCALE_CODE_VERSION="old")
    (old,) = tmp_path.glob("cache/tokscale-*/old")
    later = {"SLURM_JOB_ID": "9", "TOKSCALE_CODE_VERSION": "new"}
    for queue, stays in (("9 7", True), ("", True), ("9", False)):  # where nobody answers, nobody is dead
        answer = {"QUEUE": queue} if queue else {}
        silent = "" if queue else "squeue() { return 1; }; "
        run_library(tmp_path, f"{silent}{RUNS_TASKS} run_stage all train", **later, **answer)
        assert old.exists() == stays, queue
