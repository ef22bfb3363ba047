"""Kill every stage of the pipeline at random times, start it again, and compare with an undisturbed one.

    PYTHONPATH=.:tests python tests/reports/faults_cpu_202611/run.py ROUNDS SEED OUT.json

Each process is forked from one that has imported everything, so that a kill meets work and not imports. In half of the
rounds the clock of the processes that finish the work stands a day behind that of the killed ones. With `clock.c` in
front of the C library the clock also steps back while they run, those that are killed and those that finish:

    cc -shared -fPIC -O2 -o /tmp/clock.so tests/reports/faults_cpu_202611/clock.c
    CLOCK_FILE=/dev/shm/clock LD_PRELOAD=/tmp/clock.so PYTHONPATH=.:tests python ...
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - the first optimizer would import it in every child anew
from safetensors.torch import load_file
from text_encoders import save_t5

from tokscale import cli
from tokscale.runs.outcome import read_exit, read_outcomes
from tokscale.stages import evaluate, export, prepare, registry, sample, tokenize, train, train_tokenizer  # noqa: F401

MODEL = "{kind: dalle, dim: 16, depth: 2, heads: 2, dim_head: 8, text_seq_len: 16}"
STAGES = {
    "prepare": ["source={kind: shapes, count: 160}", "shard_samples=16"],
    "train-tokenizer": [
        "tokenizer={kind: dvae, image_size: 16, num_layers: 1, num_tokens: 16, codebook_dim: 4, hidden_dim: 4}",
        "text={kind: bpe, vocab_size: 280}",
        "batch_size=8",
        "loop={total_steps: 12, log_every: 1}",
        "checkpoint.every_steps=2",
        "quality.images=8",
    ],
    "tokenize": ["unit_samples=8"],
    "embed": ["unit_samples=8", "action=embed", "text_encoder={t5}"],
    "train": [
        f"model={MODEL}",
        "batch_size=8",
        "loop={total_steps: 12, log_every: 1}",
        "checkpoint.every_steps=2",
    ],
    "export": [],
    "sample": ['prompts=["a red circle", "two"]', "num_images=6", "batch_size=2"],
    "evaluate": ["prompts=8", "images=8", "batch_size=2"],
}
PROGRAMS = {"embed": "tokenize"}
"""Of what is not called as its program."""
DAY = 86400.0
CLOCK = os.environ.get("CLOCK_FILE")
_PATIENCE_S = 600
"""Of real time, for a stage that takes seconds: beyond it something waits for a clock that has gone back."""


def start(stage: str, work: Path, *, back: float = 0.0) -> int:
    """Fork a process that runs a stage of the pipeline in `work`; its number."""
    child = os.fork()
    if child:
        return child
    log = os.open(work.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if back:
        now = time.time
        time.time = lambda: now() - back
    code = 1
    with contextlib.suppress(BaseException):
        words = [word.format(t5=work.parent / "t5") if "{t5}" in word else word for word in STAGES[stage]]
        code = cli.main([PROGRAMS.get(stage, stage), f"run_dir={work}/run", f"data_dir={work}/data", *words])
    os._exit(code)


def set_clock(behind: float) -> None:
    """Every process of the game, from its next look on, sees a clock so many seconds behind."""
    if CLOCK:
        with open(CLOCK, "r+b") as file:
            file.write(round(behind).to_bytes(8, sys.byteorder))


def finish(stage: str, work: Path, *, back: float = 0.0, step: tuple[float, float] | None = None) -> int:
    """Its exit code; `step`: after how many seconds the clock goes back, and by how much. A hung one is killed."""
    child = start(stage, work, back=back)
    if step is not None:
        time.sleep(step[0])
        set_clock(step[1])
    deadline = time.monotonic() + _PATIENCE_S
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        time.sleep(0.02)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")
    return os.waitstatus_to_exitcode(found[1])


def kill_after(stage: str, work: Path, seconds: float, step: tuple[float, float] | None = None) -> bool:
    """Whether the kill came before the end; `step` as in `finish`."""
    child = start(stage, work)
    if step is not None:
        time.sleep(min(step[0], seconds))
        set_clock(step[1])
        seconds = max(seconds - step[0], 0)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def made(stage: str, work: Path) -> str:
    """What a stage made, as one hash; nothing of when and by whom."""
    digest = hashlib.sha256()
    match stage:
        case "prepare":
            files = sorted((work / "data/raw").glob("*.tar"))
        case "tokenize":
            files = sorted((work / "data/tokens").glob("*.tar"))
        case "train-tokenizer":
            files = [*sorted((work / "run").glob("*_tokenizer/*.safetensors"))]
        case "embed":
            files = sorted((work / "data/tokens").rglob("*embeds*.tar")) or sorted(
                (work / "data/tokens").rglob("*.tar")
            )
        case "sample":
            files = sorted((work / "run/samples").glob("*.png"))
        case "evaluate":
            report = json.loads((work / "run/report.json").read_text())
            kept = {name: report[name] for name in ("prompt_accuracy", "reconstruction_psnr", "held_out_losses")}
            return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        case "train":
            files = sorted((work / "run/checkpoints").glob("step_*"))[-1:]
        case _:
            files = sorted((work / "run/export").glob("*.safetensors"))
    assert files, f"{stage} made nothing"
    for path in files:
        if path.is_dir() or path.suffix == ".safetensors":  # their headers tell of the save, or have no fixed order
            for shard in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
                for name, tensor in sorted(load_file(shard).items()):
                    digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        else:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def successes(stage: str, work: Path) -> set[str]:
    """What says in the run folder that the stage ended well: `exit.json`, and attempts by name."""
    left, program = read_exit(work / "run"), PROGRAMS.get(stage, stage)
    found = {f"outcome {o['attempt']}" for o in read_outcomes(work / "run") if o["stage"] == program and o["code"] == 0}
    ours = left is not None and left["stage"] == program and left["code"] == 0
    return found | ({f"exit.json of {left['time']}"} if ours and left is not None else set())


def play(stage: str, seed: int, ready: Path, work: Path, seconds: float, wanted: str) -> dict[str, Any]:
    """One round: up to three kills, then the work is finished."""
    draw = random.Random(seed)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(ready, work, symlinks=True)
    back = draw.choice([0.0, DAY])
    kills, wrong, behind = 0, [], 0.0
    set_clock(0)

    def next_step() -> tuple[float, float] | None:
        nonlocal behind
        behind += draw.choice([5.0, 3600.0, DAY, 40 * DAY])
        return (draw.uniform(0.02, 0.7) * seconds, behind) if CLOCK else None

    for _ in range(draw.randint(1, 3)):
        before = successes(stage, work)
        if not kill_after(stage, work, draw.uniform(0.05, 1.0) * seconds, next_step()):
            break
        kills += 1
        if new := successes(stage, work) - before:
            wrong.append(f"a killed process left a success: {', '.join(sorted(new))}")
    code = finish(stage, work, back=back, step=next_step())
    set_clock(0)
    if code:
        wrong.append(f"ended with {code}")
    elif made(stage, work) != wanted:
        wrong.append("made something else than the undisturbed pipeline")
    clock = {"clock_back_s": back} | ({"clock_stepped_back_s": behind} if CLOCK else {})
    return {"stage": stage, "seed": seed, "kills": kills, **clock, "code": code, "wrong": wrong}


def main(rounds: int, seed: int, out: Path) -> None:
    """Play and write."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        base, work = Path(name), Path(name, "work")
        work.mkdir()
        save_t5(base / "t5")
        ready, seconds, wanted = {}, {}, {}
        for stage in STAGES:
            ready[stage] = Path(shutil.copytree(work, base / f"before-{stage}", symlinks=True))
            began = time.perf_counter()
            code = finish(stage, work)
            assert code == 0, (stage, code, (base / "log").read_text()[-3000:])
            seconds[stage], wanted[stage] = time.perf_counter() - began, made(stage, work)
        rows = []
        for number in range(rounds):
            stage = list(STAGES)[number % len(STAGES)]
            rows.append(play(stage, seed + number, ready[stage], work, seconds[stage], wanted[stage]))
            kills = sum(row["kills"] for row in rows)
            wrong = [row for row in rows if row["wrong"]]
            report = {"rounds": len(rows), "kills": kills, "wrong": len(wrong), "seconds": seconds, "rows": rows}
            out.write_text(json.dumps(report, indent=1) + "\n")
        print(
            f"{rounds} rounds, {kills} kills, {len(wrong)} wrong; {(base / 'log').read_text()[-1500:] if wrong else ''}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
