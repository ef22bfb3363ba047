"""A drill for operators: every stage, stopped in the middle in six ways, on a real scheduler.

As root, with Slurm's packages: `python tests/slurm/drill.py REPORT_FOLDER [stage ...] [ending ...]`. Each stage is
queued by `tokscale submit` on the two-node cluster of the tests. Writes `rows.json` and `README.md`, the table "what
happened, what the queue did, what status said", into the report's folder, and keeps its rows of earlier calls.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent)]

import text_encoders  # noqa: E402
import tiny_pipeline  # noqa: E402
import yaml  # noqa: E402
from drill_program import PIECES  # noqa: E402
from local_cluster import LocalCluster  # noqa: E402

from tokscale.dist.slurm import read_time  # noqa: E402

ENDINGS = {
    "killed": "its last rank gets SIGKILL",
    "cancelled": "`scancel JOB`",
    "memory": "memory runs out on the last rank, as CUDA says it",
    "time": "its time is over: it is warned a minute and a half before the end, and then goes on",
    "node": "its nodes go down, and come back when the job is queued again",
    "config": "a key in the submitted recipe that its stage does not know",
}
SUBMITTED_AS = {"tokenize-close": "tokenize"}
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
PATIENCE = 1200.0
TIME_MINUTES, WARNED_SECONDS = 6, 90
REMEMBER = 7200
"""Seconds for which the controller knows of jobs that are over: those that end first would be forgotten before the last
has come again from a lost node."""


@dataclass
class Case:
    """One stage, ended in one way."""

    stage: str
    ending: str
    folder: Path
    job: str = ""
    jobs: list[str] = field(default_factory=list)
    """All of the submission."""
    state: str = ""
    exit_code: str = ""
    restarts: int = 0
    queue: list[str] = field(default_factory=list)
    """What the batch script said of it."""
    status: list[str] = field(default_factory=list)
    """What `tokscale status` said of the jobs, and how the stage last ended."""

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


def make_inputs(folder: Path) -> None:
    """Everything that any stage reads: raw and token shards, tokenizers, a text encoder, checkpoints, an export."""
    tiny_pipeline.make_inputs(folder)
    text_encoders.save_t5(folder / "t5")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder, folder / "run"), sort_keys=False))
    for stage in ("prepare", "train", "export"):
        words = [sys.executable, "-m", "tokscale", stage, f"recipe={folder / 'recipe.yaml'}"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def recipe(inputs: Path, run_dir: Path) -> dict[str, dict[str, object]]:
    tokenizer = {"kind": "dvae", "image_size": 8, "num_tokens": 12, "codebook_dim": 4, "num_layers": 1, "hidden_dim": 4}
    short = {"loop": {"total_steps": 12, "log_every": 1}, "checkpoint": {"every_steps": 2}, "batch_size": 8}
    return {
        "shared": {
            "run_dir": str(run_dir),
            "data_dir": str(inputs / "data"),
            "image_tokenizer": str(inputs / "image_tokenizer"),
            "text_tokenizer": str(inputs / "text_tokenizer"),
        },
        "prepare": {"source": {"kind": "shapes", "count": 64}, "shard_samples": 16},
        "train-tokenizer": {"tokenizer": tokenizer, **short},
        "tokenize": {"unit_samples": 16, "text_encoder": str(inputs / "t5"), "text_encoder_precision": "fp32"},
        "train": {"model": tiny_pipeline.MODEL, **short},
        "export": {},
        "sample": {"prompts": ["a small red circle", "a large blue circle"] * 2, "batch_size": 2},
        "evaluate": {"prompts": 8, "images": 4, "batch_size": 2},
    }


def queue(case: Case, inputs: Path, cluster: LocalCluster) -> None:
    """Submit the stage as a user would."""
    own = case.folder / "inputs"
    case.folder.mkdir(parents=True)
    shutil.copytree(inputs, own)
    if case.stage in ("export", "sample", "evaluate"):
        shutil.copytree(own / "run", case.run_dir)
        if case.stage == "export":
            shutil.rmtree(case.run_dir / "export")
    if case.stage == "prepare":
        shutil.rmtree(own / "data/raw")
    if case.stage.startswith("tokenize"):
        shutil.rmtree(own / "data/tokens")
    (case.folder / "slow").touch()
    if case.ending == "memory":
        (case.folder / "memory").touch()
    interpreter = case.folder / "python"
    interpreter.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {HERE}/drill_program.py "$@"\n')
    interpreter.chmod(0o755)
    (case.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(own, case.run_dir), sort_keys=False))
    words = [f"recipe={case.folder / 'recipe.yaml'}", "cluster=local", f"cluster.python={interpreter}"]
    words += [
        f"cluster.env={{DRILL: {case.folder}, DRILL_STAGE: {case.stage}, DS_ACCELERATOR: cpu, OMP_NUM_THREADS: 1}}",
        "tokenize_tasks=1",
    ]
    words += [f"stages=[{SUBMITTED_AS.get(case.stage, case.stage)}]"]
    if case.ending == "time":
        words += [f"cluster.stages.{case.stage}.time='{TIME_MINUTES}'", f"cluster.signal_seconds={WARNED_SECONDS}"]
    if case.ending == "config":
        words += [f"after={cluster.submit('--hold', '--output=/dev/null', '--wrap', 'true')}"]
    called(["submit", *words], cluster)
    (folder,) = (case.run_dir / "submitted").iterdir()
    jobs = {job["name"]: job["job"] for job in json.loads((folder / "jobs.json").read_text())["jobs"]}
    case.job, case.jobs = jobs[case.stage], [*jobs.values()]
    if case.ending == "config":
        text = (folder / "recipe.yaml").read_text()
        (folder / "recipe.yaml").write_text(re.sub(r"^(\S+:)\n", r"\1\n  nonsense: 1\n", text, flags=re.MULTILINE))
        cluster.call("scontrol", "release", words[-1].removeprefix("after="))


def called(words: list[str], cluster: LocalCluster) -> str:
    """What a command of tokscale prints."""
    told = subprocess.run(
        [sys.executable, "-m", "tokscale", *words], capture_output=True, text=True, env=cluster.environ
    )
    if told.returncode:
        raise RuntimeError(f"{words} ended with {told.returncode}: {told.stderr}")
    return told.stdout


def ranks(case: Case) -> dict[int, int]:
    """The processes of a case's job, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environ = dict(pair.split("=", 1) for pair in (entry / "environ").read_text().split("\0") if "=" in pair)
            words = (entry / "cmdline").read_text()
        except OSError:
            continue
        if environ.get("DRILL") == str(case.folder) and "drill_program" in words and "SLURM_PROCID" in environ:
            found[int(environ["SLURM_PROCID"])] = int(entry.name)
    return found


def steps(cluster: LocalCluster) -> Iterator[str]:
    """What the nodes run: a process of Slurm's watches over each step."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words, environ = (entry / "cmdline").read_text(), (entry / "environ").read_text()
            if words.startswith("slurmstepd") and f"SLURM_CONF={cluster.folder}/slurm.conf" in environ:
                yield words


def end(ending: str, cases: list[Case], cluster: LocalCluster) -> None:
    """Do to all what the drill is about, and let them go on."""
    if ending == "killed":
        for case in cases:
            os.kill(max(ranks(case).items())[1], signal.SIGKILL)
    elif ending == "cancelled":
        for case in cases:
            cluster.call("scancel", case.job)
    elif ending == "time":
        ends = {case.job: read_time(state(case, cluster), "EndTime") or 0.0 for case in cases}
        for case in sorted(cases, key=lambda case: ends[case.job]):  # Slurm warns then, or up to a minute earlier
            until(lambda at=ends[case.job] - WARNED_SECONDS + 5: time.time() > at, f"{case.stage} is warned")
            (case.folder / "slow").unlink()
    elif ending == "node":
        # Nothing starts meanwhile: these nodes would be back as soon as they say again that they are there. A lost one
        # comes back without its processes, and where one is left Slurm will not start its job a second time.
        cluster.call("scontrol", "update", "partitionname=all", "state=down")
        cluster.call("scontrol", "update", "nodename=n[1-2]", "state=down", "reason=drill")
        until(lambda: all(state(case, cluster)["JobState"] != "RUNNING" for case in cases), "the nodes are down")
        until(lambda: not any(steps(cluster)), "nothing runs on the nodes any more")
        with suppress(RuntimeError):  # those that have registered anew are back by themselves
            cluster.call("scontrol", "update", "nodename=n[1-2]", "state=resume")
        cluster.call("scontrol", "update", "partitionname=all", "state=up")
    for case in cases:
        (case.folder / "slow").unlink(missing_ok=True)


def state(case: Case, cluster: LocalCluster) -> dict[str, str]:
    return cluster.job(case.job)


def look(case: Case, cluster: LocalCluster) -> None:
    """Note what became of a case."""
    fields = state(case, cluster)
    case.state, case.exit_code, case.restarts = fields["JobState"], fields["ExitCode"], int(fields["Restarts"])
    text = "".join(path.read_text() for path in sorted(case.run_dir.glob(f"logs/slurm-{case.stage}-{case.job}*.log")))
    case.queue = [
        plain(line, case) for line in re.findall(r"^== ((?:not )?requeu.*|job \S+ avoids.*)$", text, re.MULTILINE)
    ]
    told = called(["status", f"run_dir={case.run_dir}"], cluster).splitlines()
    kept = ("job ", "to queue", "last ended", f"{case.stage} was", f"{case.stage} ended", f"{case.stage} runs")
    case.status = [plain(line.strip(), case) for line in told if line.strip().startswith(kept)]


def plain(line: str, case: Case) -> str:
    """A line without what only this call of the drill means."""
    line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", line.replace(str(case.folder), "/shared"))
    return re.sub(r"cluster\.python=.*?(?= action=|$)", "...", line)


def until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {seconds:.0f} s: {what}")
        time.sleep(0.5)


def run(stages: Iterable[str], ending: str, inputs: Path, folder: Path, cluster: LocalCluster) -> list[Case]:
    """All stages at once, ended in one way."""
    cases = [Case(stage, ending, folder / ending / stage) for stage in stages]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda case: queue(case, inputs, cluster), cases))
    if ending != "config":
        until(lambda: all((case.folder / "reached").exists() for case in cases), f"all are in the middle: {ending}")
    end(ending, cases, cluster)
    over = lambda case: all(cluster.job(job)["JobState"] in DONE for job in case.jobs)  # noqa: E731
    until(lambda: all(over(case) for case in cases), f"all are over: {ending}")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda case: look(case, cluster), cases))
    for case in cases:
        print(case.stage, ending, case.state, case.exit_code, case.restarts, *case.queue, *case.status, sep="\n  ")
    cluster.cancel_all()
    return cases


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Every stage, stopped in the middle in six ways",
        "",
        "By `python tests/slurm/drill.py` on the two-node Slurm of the tests, through `tokscale submit`. A stage is",
        "stopped after a piece of its work was done, if it has several. `...` stands for the words of the submission.",
        "Memory runs out as CUDA says it: without cgroups no scheduler ends a task for it here.",
        "",
    ]
    for ending, happens in ENDINGS.items():
        chosen = [row for row in rows if row["ending"] == ending]
        if chosen:
            head = "| stage | job | what the queue did | what `status` said |"
            lines += [f"## {ending}: {happens}", "", head, "|---|---|---|---|"]
        for row in chosen:
            cells = ["<br>".join(line.replace("|", "\\|") for line in row[key]) for key in ("queue", "status")]
            ended = f"{row['state']} {row['exit_code']}, restarts {row['restarts']}"
            queue = cells[0] or ("Slurm itself put it back" if row["restarts"] else "nothing")
            lines += [f"| {row['stage']} | {ended} | {queue} | {cells[1]} |"]
        lines += [""] if chosen else []
    return "\n".join(lines)


def main(report: Path, words: list[str]) -> None:
    stages = [word for word in words if word in PIECES] or [*PIECES]
    endings = [word for word in words if word in ENDINGS] or [*ENDINGS]
    path = report / "rows.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    folder.chmod(0o755)
    make_inputs(folder / "inputs")
    with LocalCluster(folder / "cluster", cpus=16, remember=REMEMBER) as cluster:
        for ending in endings:
            for case in run(stages, ending, folder / "inputs", folder, cluster):
                rows = [row for row in rows if (row["stage"], row["ending"]) != (case.stage, case.ending)]
                rows.append({key: value for key, value in asdict(case).items() if key not in ("folder", "job", "jobs")})
            report.mkdir(parents=True, exist_ok=True)
            rows.sort(key=lambda row: (list(ENDINGS).index(row["ending"]), list(PIECES).index(row["stage"])))
            path.write_text(json.dumps(rows, indent=1) + "\n")
            (report / "README.md").write_text(table(rows) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
