"""One pipeline through a local cluster, preempted twice and moved from two nodes to one; draws what happened.

As root, with Slurm's packages: `python tests/reports/slurm_cpu_202611/run.py WORK_FOLDER`. With `SLURM_CONF` set, the
cluster that runs there is used. Writes `timeline.json` and `timeline.png` beside this file; `run.py draw` the image
alone, again. Afterwards the same training is run once more undisturbed, and the losses compared.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "slurm"))
from local_cluster import LocalCluster  # noqa: E402

RECIPE = "recipe=debug/dalle"
STEPS = 200
PREEMPTED, STOPPED = (30, 80), 130
"""Steps after which the training is disturbed."""
PATIENCE = 900.0
FOLDERS = {"data_dir": "data", "image_tokenizer": "image_tokenizer", "text_tokenizer": "text_tokenizer"}
COLOURS = {"PENDING": "#dddddd", "RUNNING": "#2a7ab0", "COMPLETING": "#e0a030"}
LIGHT = "#7fb8dc"


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


def submit(run_dir: Path, stages: str, nodes: int, *more: str) -> dict[str, str]:
    words = [RECIPE, f"run_dir={run_dir}", "cluster=local", f"cluster.nodes={nodes}", f"stages=[{stages}]"]
    words += ["tokenize_tasks=2", f"train.loop.total_steps={STEPS}", "cluster.max_restarts=5", *more]
    subprocess.run([sys.executable, "-m", "tokscale", "submit", *words], check=True)
    return json.loads((sorted((run_dir / "submitted").iterdir())[-1] / "jobs.json").read_text())


def until(what: str, condition: Callable[[], bool], jobs: dict[str, str], *, may_fail: bool = False) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        bad = [name for name, job in jobs.items() if state(job) in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")]
        if (bad and not may_fail) or time.monotonic() > deadline:
            raise RuntimeError(f"never came: {what}; failed: {bad}")
        time.sleep(0.1)


def state(job: str) -> str:
    told = ask("scontrol", "show", "job", "--oneliner", job)
    return told.partition("JobState=")[2].split(" ")[0]


def rows_of(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def pipeline(run_dir: Path, watcher: Watcher) -> None:
    metrics, starts = run_dir / "metrics.jsonl", run_dir / "starts.jsonl"
    jobs = submit(run_dir, "prepare,train-tokenizer,tokenize,train", 2)
    for number, step in enumerate(PREEMPTED, 1):
        until(f"step {step}", lambda step=step: len(rows_of(metrics)) >= step, jobs)
        ask("scancel", "--signal=USR1", jobs["train"])
        watcher.note(f"preemption {number}: SIGUSR1 after step {len(rows_of(metrics))}")
        until("the next start", lambda number=number: len(rows_of(starts)) > number, jobs)
        watcher.note(f"start {number + 1}, on two nodes, from step {rows_of(starts)[-1]['step']}")
    until(f"step {STOPPED}", lambda: len(rows_of(metrics)) >= STOPPED, jobs)
    (run_dir / "STOP").touch()
    watcher.note(f"file STOP after step {len(rows_of(metrics))}")
    until("the end", lambda: state(jobs["train"]) == "FAILED", jobs, may_fail=True)
    code = json.loads((run_dir / "exit.json").read_text())["code"]
    jobs = submit(run_dir, "train,export,evaluate", 1)
    watcher.note(f"ended with {code} at step {len(rows_of(metrics))}; submitted again with one node")
    until("the end", lambda: state(jobs["evaluate"]) == "COMPLETED", jobs)
    watcher.note("evaluated")
    time.sleep(1)


def undisturbed(run_dir: Path, disturbed: Path) -> None:
    """The same training once more in one go on two nodes."""
    folders = [f"{name}={disturbed / folder}" for name, folder in FOLDERS.items()]
    jobs = submit(run_dir, "train", 2, *folders)
    until("the end", lambda: state(jobs["train"]) == "COMPLETED", jobs)


def compared(run_dir: Path, other: Path) -> dict[str, float]:
    """How the losses of the disturbed run differ from those of the other, relatively."""
    mine, theirs = ([row["loss"] for row in rows_of(each / "metrics.jsonl")] for each in (run_dir, other))
    moved = rows_of(run_dir / "starts.jsonl")[-1]["step"]
    off = [abs(one - two) / abs(two) for one, two in zip(mine, theirs, strict=True)]
    return {
        "steps": len(mine),
        "moved_to_one_node_after": moved,
        "largest_on_two_nodes": max(off[:moved]),
        "first_on_one_node": off[moved],
        "largest_of_20_on_one_node": max(off[moved : moved + 20]),
        "largest": max(off),
        "last_loss": mine[-1],
    }


def draw(report: dict, path: Path) -> None:
    rows: dict[tuple[str, str], list] = {}
    for now, job, name, what, nodes in report["squeue"]:
        rows.setdefault((job, name.removeprefix("tokscale-")), []).append((now, what, int(nodes)))
    rows = dict(sorted(rows.items(), key=lambda row: [int(part) for part in row[0][0].split("_")]))
    figure, (axes, below) = plt.subplots(
        2, 1, figsize=(11, 0.36 * len(rows) + 5), sharex=True, height_ratios=[0.36 * len(rows), 2.2]
    )
    for at, marks in enumerate(rows.values()):
        for (now, what, nodes), after in zip(marks, [*marks[1:], marks[-1]], strict=True):
            shade = LIGHT if what == "RUNNING" and nodes == 1 else COLOURS.get(what, "#c05050")
            axes.barh(at, max(after[0] - now, 0.5), left=now, height=0.7, color=shade)
    axes.set_yticks(range(len(rows)), [f"{name} ({job})" for job, name in rows], fontsize=8)
    axes.invert_yaxis()
    times = [now for now, _ in report["metrics"]]
    below.scatter(times, [step for _, step in report["metrics"]], s=3, color=COLOURS["RUNNING"])
    below.set_ylabel("training step", fontsize=8)
    below.set_xlim(left=0)
    for number, (now, _) in enumerate(report["events"], 1):
        for each in (axes, below):
            each.axvline(now, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(str(number), (now, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    shades = {**COLOURS, "RUNNING on one node": LIGHT}
    axes.legend(
        [plt.Rectangle((0, 0), 1, 1, color=each) for each in shades.values()], shades, fontsize=7, loc="lower left"
    )
    notes = "\n".join(f"{number}: {now:.0f} s: {what}" for number, (now, what) in enumerate(report["events"], 1))
    below.set_xlabel(f"seconds\n{notes}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(work: Path) -> None:
    run_dir, other = work / "run", work / "undisturbed"
    with ExitStack() as stack:
        if "SLURM_CONF" not in os.environ:
            cluster = stack.enter_context(LocalCluster(work / "cluster"))
            os.environ["SLURM_CONF"] = cluster.environ["SLURM_CONF"]
        watcher = Watcher()
        watcher.start()
        try:
            pipeline(run_dir, watcher)
        finally:
            watcher.done.set()
            watcher.join()
        undisturbed(other, run_dir)
    metrics = [[round(row["time"] - watcher.began, 1), row["step"]] for row in rows_of(run_dir / "metrics.jsonl")]
    report = {
        "losses": compared(run_dir, other),
        "starts": rows_of(run_dir / "starts.jsonl"),
        "events": watcher.events,
        "squeue": thinned(watcher.seen),
        "metrics": metrics,
    }
    (HERE / "timeline.json").write_text(
        "{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in report.items()) + "\n}\n"
    )
    for name in ("env.json", "command.txt", "config.yaml"):
        (HERE / name).write_text(plain((run_dir / name).read_text(), work))
    draw(report, HERE / "timeline.png")


def plain(text: str, work: Path) -> str:
    """Without where things happened to lie."""
    places = {work: "WORK", sys.executable: "python", HERE.parents[2]: "CHECKOUT"}
    for place, word in places.items():
        text = text.replace(str(place), word)
    return text


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
    if sys.argv[1] == "draw":
        draw(json.loads((HERE / "timeline.json").read_text()), HERE / "timeline.png")
    else:
        main(Path(sys.argv[1]).absolute())
