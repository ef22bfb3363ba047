"""One pipeline through a local cluster, preempted twice and moved from two nodes to one; draws what happened.

As root, with Slurm's packages: `python tests/reports/slurm_cpu_202611/run.py WORK_FOLDER`. With `SLURM_CONF` set, the
cluster that runs there is used. Writes `timeline.json` and `timeline.png` beside this file.
"""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "slurm"))
from local_cluster import LocalCluster  # noqa: E402

RECIPE = "recipe=debug/dalle"
STEPS = 60


class Watcher(threading.Thread):
    """Notes twice a second which job is in which state on how many nodes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.began, self.seen, self.events = time.time(), [], []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            told = ask("squeue", "--noheader", "--array", "--format=%i|%j|%T|%D")
            now = round(time.time() - self.began, 1)
            self.seen += [[now, *line.split("|")] for line in told.splitlines()]

    def note(self, what: str) -> None:
        self.events.append([round(time.time() - self.began, 1), what])
        print(self.events[-1], flush=True)


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def submit(run_dir: Path, stages: str, nodes: int) -> dict[str, str]:
    words = [RECIPE, f"run_dir={run_dir}", "cluster=local", f"cluster.nodes={nodes}", f"stages=[{stages}]"]
    words += ["tokenize_tasks=2", f"train.loop.total_steps={STEPS}", "cluster.max_restarts=5"]
    subprocess.run([sys.executable, "-m", "tokscale", "submit", *words], check=True)
    return json.loads((sorted((run_dir / "submitted").iterdir())[-1] / "jobs.json").read_text())


def steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait(run_dir: Path, jobs: dict[str, str], step: int) -> None:
    while steps(run_dir) < step:
        bad = [job for job in jobs.values() if state(job) in ("FAILED", "CANCELLED", "TIMEOUT")]
        assert not bad, (bad, jobs)
        time.sleep(0.1)


def state(job: str) -> str:
    told = ask("scontrol", "show", "job", "--oneliner", job)
    return told.partition("JobState=")[2].split(" ")[0]


def starts(run_dir: Path) -> int:
    path = run_dir / "starts.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def pipeline(run_dir: Path, watcher: Watcher) -> None:
    jobs = submit(run_dir, "prepare,train-tokenizer,tokenize,train", nodes=2)
    for number, step in enumerate((8, 20), 1):
        wait(run_dir, jobs, step)
        ask("scancel", "--signal=USR1", jobs["train"])
        watcher.note(f"preemption {number}: SIGUSR1 after step {steps(run_dir)}")
        while starts(run_dir) < number + 1:
            time.sleep(0.2)
        last = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[-1])
        watcher.note(f"start {number + 1} from step {last['step']}")
    wait(run_dir, jobs, 35)
    (run_dir / "STOP").touch()
    watcher.note("file STOP")
    while state(jobs["train"]) != "FAILED":
        time.sleep(0.2)
    watcher.note(f"ended with {json.loads((run_dir / 'exit.json').read_text())['code']}, submitted again with one node")
    jobs = submit(run_dir, "train,export,evaluate", nodes=1)
    while state(jobs["evaluate"]) not in ("COMPLETED", "FAILED", "CANCELLED"):
        time.sleep(0.5)
    watcher.note(f"pipeline {state(jobs['evaluate'])}")
    time.sleep(1)


def draw(seen: list, events: list, path: Path) -> None:
    rows: dict[tuple[str, str], list] = {}
    for now, job, name, what, nodes in seen:
        rows.setdefault((job, name.removeprefix("tokscale-")), []).append((now, what, int(nodes)))
    colours = {"PENDING": "#dddddd", "RUNNING": "#2a7ab0", "COMPLETING": "#e0a030", "CONFIGURING": "#e0a030"}
    _, axes = plt.subplots(figsize=(11, 0.45 * len(rows) + 1.8))
    for at, marks in enumerate(rows.values()):
        for (now, what, nodes), after in zip(marks, [*marks[1:], marks[-1]], strict=True):
            shade = "#7fb8dc" if what == "RUNNING" and nodes == 1 else colours.get(what, "#c05050")
            axes.barh(at, max(min(after[0] - now, 2), 0.5), left=now, height=0.7, color=shade)
    axes.set_yticks(range(len(rows)), [f"{name} ({job})" for job, name in rows])
    axes.invert_yaxis()
    for number, (now, _) in enumerate(events, 1):
        axes.axvline(now, color="black", linewidth=0.8, linestyle=":")
        axes.text(now, -0.7, str(number), ha="center", fontsize=8)
    notes = "\n".join(f"{number}: {what}" for number, (_, what) in enumerate(events, 1))
    axes.set_xlabel(
        "seconds (grey: waiting, dark: two nodes, light: one node, yellow: completing)\n" + notes, fontsize=8
    )
    plt.tight_layout()
    plt.savefig(path, dpi=110)


def main(work: Path) -> None:
    with ExitStack() as stack:
        if "SLURM_CONF" not in os.environ:
            cluster = stack.enter_context(LocalCluster(work / "cluster"))
            os.environ["SLURM_CONF"] = cluster.environ["SLURM_CONF"]
        watcher = Watcher()
        watcher.start()
        try:
            pipeline(work / "run", watcher)
        finally:
            watcher.done.set()
            watcher.join()
    (HERE / "timeline.json").write_text(json.dumps({"events": watcher.events, "squeue": thinned(watcher.seen)}))
    draw(watcher.seen, watcher.events, HERE / "timeline.png")


def thinned(seen: list) -> list:
    """Without lines that say the same as those before and after them."""
    lines: dict[str, list] = {}
    for line in seen:
        lines.setdefault(line[1], []).append(line)
    return [
        line
        for each in lines.values()
        for before, line, after in zip([None, *each], each, [*each[1:], None], strict=False)
        if before is None or after is None or before[2:] != line[2:] or after[2:] != line[2:]
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
