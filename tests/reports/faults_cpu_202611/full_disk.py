"""Fill the disk under one of two ranks while it saves, make room, start again, and compare with an undisturbed run.

    PYTHONPATH=.:tests python tests/reports/faults_cpu_202611/full_disk.py ROUNDS SEED OUT.json   # as root: it mounts

Two ranks of `tokscale train` under ZeRO-3 save into a run folder on a real tmpfs. In rounds of kind `small` the tmpfs
is too small for all saves, so the kernel refuses a write of whichever rank comes last; in rounds of kind `limit` the
system refuses to rank 1 alone what goes beyond a size (RLIMIT_FSIZE, EFBIG), as a full disk of its own would. Then
there is room, and the same command has to end with the weights and moments of the undisturbed run, bit for bit.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - each child would import it anew
import run as game

import tokscale.engine.zero  # noqa: F401
from tokscale import cli
from tokscale.checkpoint.status import describe
from tokscale.runs.outcome import read_exit

PEAK = 12 << 20
"""Bytes that hold every run folder of this game."""
PATIENCE_S = 300


def start(work: Path, run_dir: Path, *, background: bool, limit: int = 0) -> list[int]:
    """Fork both ranks; their process numbers. `limit`: bytes beyond which no file of rank 1 may grow."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            log = os.open(work / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_SIZE": 2}
            os.environ |= {name: str(value) for name, value in here.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if rank == 1 and limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = 1
            with contextlib.suppress(BaseException):
                folders = [f"run_dir={run_dir}", f"data_dir={work}/data"]
                folders += [f"{kind}_tokenizer={work}/run/{kind}_tokenizer" for kind in ("image", "text")]
                more = ["engine={kind: zero, stage: 3, param_persistence_threshold: 0}"]
                more += ["preflight.when=never", f"checkpoint.async_save={str(background).lower()}"]
                code = cli.main(["train", *folders, *game.STAGES["train"], *more])
            os._exit(code)
        children.append(child)
    return children


def ends(children: list[int]) -> list[int]:
    """Exit codes by rank; what hangs is killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG)) != (0, 0):
                codes[child] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Any:
    """A file system of so many bytes."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def made(run_dir: Path) -> dict[str, bytes]:
    """Tensors of the newest checkpoint."""
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    tensors = {}
    for shard in sorted(newest.glob("*.safetensors")):
        tensors |= {f"{shard.name} {k}": v.contiguous().numpy().tobytes() for k, v in game.load_file(shard).items()}
    return tensors


def play(seed: int, kind: str, work: Path, sizes: dict[str, int], wanted: dict[str, bytes]) -> dict[str, Any]:
    """One round."""
    draw, wrong = random.Random(seed), []
    background = draw.random() < 0.5
    size = int(draw.uniform(0.15, 0.95) * sizes["run"]) if kind == "small" else PEAK
    limit = int(draw.uniform(0.1, 0.95) * sizes["shard"]) if kind == "limit" else 0
    for log in work.glob("rank_*.txt"):
        log.unlink()
    with disk(work / "disk", size) as folder:
        codes = ends(start(work, folder / "run", background=background, limit=limit))
        said = [path.read_text(errors="replace") for path in sorted(work.glob("rank_*.txt"))]
        if any(codes):
            left = read_exit(folder / "run") if (folder / "run").exists() else None
            if left is not None and left["code"] == 0:
                wrong.append("exit.json says that it ended well")
            if 74 not in codes or not set(codes) <= {74, 76}:
                wrong.append(f"ended with {codes}")
            if any("Traceback" in text for text in said):
                wrong.append("a traceback")
        elif kind == "limit":
            wrong.append("ended well where nothing could be saved")
        kept = describe(folder / "run/checkpoints", verify="full") if (folder / "run/checkpoints").exists() else []
        bad = [info.step for info in kept if info.problem]
        if bad:
            wrong.append(f"damaged checkpoints were committed: {bad}")
        subprocess.run(["mount", "-o", f"remount,size={PEAK}", str(folder)], check=True)
        again = ends(start(work, folder / "run", background=background))
        if any(again):
            wrong.append(f"with room it ended with {again}")
        elif made(folder / "run") != wanted:
            wrong.append("made something else than the undisturbed run")
    steps = [info.step for info in kept]
    shown = {"kind": kind, "seed": seed, "bytes": size if kind == "small" else limit, "background": background}
    return shown | {"codes": codes, "kept_steps": steps, "codes_with_room": again, "wrong": wrong}


def main(rounds: int, seed: int, out: Path) -> None:
    """Play and write."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        work = Path(name, "work")
        work.mkdir()
        for stage in ("prepare", "train-tokenizer", "tokenize"):
            code = game.finish(stage, work)
            assert code == 0, (stage, code, Path(name, "log").read_text()[-3000:])
        with disk(work / "disk", PEAK) as folder:
            codes = ends(start(work, folder / "run", background=False))
            said = [path.read_text(errors="replace")[-2000:] for path in sorted(work.glob("rank_*.txt"))]
            assert codes == [0, 0], (codes, said)
            wanted = made(folder / "run")
            used = shutil.disk_usage(folder).used
            shards = [path.stat().st_size for path in (folder / "run/checkpoints").glob("step_*/model.rank_00001*")]
        rows = []
        for number in range(rounds):
            kind = ("small", "limit")[number % 2]
            rows.append(play(seed + number, kind, work, {"run": used, "shard": min(shards)}, wanted))
            refused = sum(any(row["codes"]) for row in rows)
            wrong = sum(bool(row["wrong"]) for row in rows)
            report = {"rounds": len(rows), "refused": refused, "wrong": wrong, "rows": rows}
            out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{rounds} rounds, {refused} refused, {wrong} wrong")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
