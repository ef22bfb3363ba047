"""`tokscale status`: what stands in a run folder, for a person. Looks, and changes nothing."""

import datetime
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokscale.base.errors import DataError
from tokscale.base.files import as_written, read_json
from tokscale.checkpoint.status import describe, table
from tokscale.dist.env import ProcessEnv
from tokscale.runs.goodput import goodput
from tokscale.runs.lock import holder
from tokscale.runs.outcome import EXIT_FILE, read_exit, read_outcomes
from tokscale.runs.outcome import FOLDER as OUTCOMES
from tokscale.runs.run_folder import CONFIG_FILE, read_config
from tokscale.runs.segments import describe as describe_segment
from tokscale.runs.segments import read_segments
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.runs.submitted import SUBMITTED, queue_lines
from tokscale.train.ledger import LEDGER_FILE
from tokscale.train.metrics import read_metrics

_CLEAR = "\x1b[H\x1b[2J"
_PACE = 20
"""Lines of metrics.jsonl that a pace is taken from."""
SHOWN = ("loss", "held_out/loss", "lr", "grad_norm", "images_per_second", "tokens_per_second", "mfu", "nonfinite_steps")


class StatusConfig(StageConfig):
    """Keys of the `status` stage."""

    verify: Literal["sizes", "full"] = "sizes"
    """How checkpoints are looked at: `full` reads every byte and compares hashes."""
    watch: float = Field(default=0.0, ge=0)
    """Look again every so many seconds, on a cleared screen, until nothing in `run_dir` is in use any more or Ctrl-C
    ends it; 0 looks once."""


CONFIG = StatusConfig


def run(config: StatusConfig, env: ProcessEnv) -> StageResult:
    """Print what stands in `run_dir`, and in every run folder directly below it.

    Raises:
        DataError: When there is no such folder.
    """
    if not config.run_dir.is_dir():
        raise DataError(f"{config.run_dir}: no such folder; give run_dir=FOLDER, or the recipe it was made by")
    if env.is_main:
        try:
            _look(config)
        except KeyboardInterrupt:
            if not config.watch:
                raise
    return StageResult(f"looked at {config.run_dir}")


def _look(config: StatusConfig) -> None:
    """Print once, or again and again while a job is at work here."""
    while True:
        folders = (config.run_dir, *sorted(path.parent for path in config.run_dir.glob("*/config.yaml")))
        shown = [
            line for folder in folders for line in (f"{folder}", *(f"  {x}" for x in lines(folder, config.verify)), "")
        ]
        if config.watch and sys.stdout.isatty():
            print(_CLEAR, end="")
        print("\n".join(shown), flush=True)
        if not config.watch or not _at_work(folders):
            return
        time.sleep(config.watch)


def _at_work(folders: Sequence[Path]) -> bool:
    return any(holder(folder) for folder in folders)


def lines(folder: Path, verify: Literal["sizes", "full"] = "sizes") -> Iterator[str]:
    """What there is to say about one folder."""
    sections = read_config(folder)
    with as_written(folder / CONFIG_FILE):
        for stage, values in sections.items():
            yield f"run of {stage}: {_what(values)}"
    for segment in read_segments(folder):
        yield describe_segment(segment)
    if sections:
        who = holder(folder)
        yield f"in use by {who}" if who else "not in use"
    for path in sorted((folder / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime):
        done = read_json(path)
        with as_written(path):
            over = f" over {done['processes']} processes" if done.get("processes", 1) > 1 else ""
            yield f"{path.stem} done in {done['seconds']:.0f} s{over}: {done['summary']}"
    ended = read_exit(folder)
    if ended is not None:
        with as_written(folder / EXIT_FILE):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ended["time"]))
            why = "" if ended["code"] == 0 and ended["stage"] in _done(folder) else f": {ended['message']}"
            yield f"last ended {when}: {ended['stage']} with code {ended['code']}{why}"
    with as_written(folder / OUTCOMES):
        yield from _attempts(folder, ended)
    yield from queue_lines(folder)
    rows = read_metrics(folder)
    if rows:
        with as_written(folder / "metrics.jsonl"):
            yield f"step {rows[-1]['step']}: {_metrics(rows[-1])}"
            yield from _outlook(sections, rows)
    with as_written(folder / LEDGER_FILE):
        if (found := goodput(folder)) is not None:
            yield found.words()
    sheets = sorted((folder / "samples").glob("step_*.png"))
    if sheets:
        yield f"newest images: {sheets[-1]}"
    if (folder / "checkpoints").is_dir():
        yield from table(describe(folder / "checkpoints", verify=verify)).splitlines()
    if not (sections or rows or ended or (folder / "stages").is_dir() or (folder / SUBMITTED).is_dir()):
        yield "nothing that a stage of tokscale made"


def _done(folder: Path) -> set[str]:
    """Stages that are said to be done."""
    return {path.stem for path in (folder / "stages").glob("*.json")}


def _attempts(folder: Path, last: Mapping[str, Any] | None) -> Iterator[str]:
    """Of each stage what runs, and how its newest attempt ended if `exit.json` tells of another."""
    outcomes = [outcome for outcome in read_outcomes(folder) if not outcome.get("refused")]
    for outcome in outcomes:
        if outcome["state"] == "running":
            yield f"{outcome['stage']} runs as process {outcome['pid']} on {outcome['node']}"
    for stage, outcome in {outcome["stage"]: outcome for outcome in outcomes}.items():
        if outcome["state"] == "killed":
            yield f"{stage} was killed: attempt {outcome['attempt']} on {outcome['node']} has begun and never ended"
        elif outcome["state"] == "ended" and outcome["code"] == 0 and stage in _done(folder):
            continue  # said to be done
        elif outcome["state"] == "ended" and (last is None or stage != last["stage"]):
            yield f"{stage} ended with code {outcome['code']}: {outcome['message']}"


def _outlook(sections: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How long the run still takes, at the pace of its last lines, with whatever stood between its steps."""
    total = max((section.get("loop", {}).get("total_steps", 0) for section in sections.values()), default=0)
    last, before = rows[-1], rows[max(len(rows) - 1 - _PACE, 0)]
    steps, seconds = last["step"] - before["step"], last["time"] - before["time"]
    if 0 < last["step"] < total and steps > 0 and seconds > 0:
        left = datetime.timedelta(seconds=round((total - last["step"]) * seconds / steps))
        done = f"{last['step']} of {total} steps ({last['step'] / total:.0%})"
        yield f"{done}, {left} left at {steps / seconds:.3g} steps/s"


def _what(values: Mapping[str, Any]) -> str:
    kind = next(
        (values[key].get("kind", "") for key in ("model", "tokenizer") if isinstance(values.get(key), dict)), ""
    )
    steps = values.get("loop", {}).get("total_steps", "?")
    engine = values.get("engine", {}).get("kind", "?")
    return f"{kind}, {steps} steps of {values.get('batch_size', '?')} samples, engine {engine}"


def _metrics(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]:.4g}" for name in SHOWN if row.get(name) is not None)
