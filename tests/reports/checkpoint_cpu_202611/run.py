"""Two hundred rounds of damage to checkpoints, and what came of each; then what saving, loading and exporting cost.

    python tests/reports/checkpoint_cpu_202611/run.py faults|zero3|bench|draw ...

`faults`: 180 rounds on the commit layer with the eager engine, `zero3`: 20 with two ZeRO-3 ranks of which one is
killed, `bench`: the rows of `tokscale bench checkpoint`. Each writes its JSON beside this file; `draw` the image.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.runs.environment import environment

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
FIRST_SEED = {"faults": 202611000, "zero3": 202611500}


def faults() -> None:
    program = TESTS / "integration" / "checkpoint_rounds.py"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        subprocess.run([sys.executable, str(program), "random", str(FIRST_SEED["faults"]), "180", str(out)], check=True)
        rows = json.loads(out.read_text())["rounds"]
    write("faults", rows)


def zero3() -> None:
    sys.path.append(str(TESTS / "distributed"))
    import test_checkpoint_zero_faults as game

    with tempfile.TemporaryDirectory() as folder:
        game.rounds(Path(folder), range(FIRST_SEED["zero3"], FIRST_SEED["zero3"] + 20))
        rows = json.loads((Path(folder) / "outcomes.json").read_text())
    write("zero3", [row | {"wrong": []} for row in rows])  # a round that goes wrong ends the game


def bench() -> None:
    from tokscale.bench.checkpoint import CheckpointBench, rows

    config = CheckpointBench(rounds=3)
    write("bench", rows(config), config=config.model_dump(mode="json"))


def write(name: str, rows: list[dict], **more: object) -> None:
    env = environment(Comm(ProcessEnv())) | {"executable": Path(sys.executable).name}
    values = {"env": env, **more, "rows": rows}
    if name in FIRST_SEED:
        values["summary"] = {
            "rounds": len(rows),
            "wrong": sum(bool(row["wrong"]) for row in rows),
            "outcomes": Counter(row["outcome"] for row in rows),
        }
    (HERE / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")


def draw() -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = json.loads((HERE / "faults.json").read_text())["rows"]
    rows += [
        row | {"fault": f"{row['fault']} (ZeRO-3)"} for row in json.loads((HERE / "zero3.json").read_text())["rows"]
    ]
    names = sorted({what(row) for row in rows})
    kinds = {"bit-equal": "#2a7ab0", "refused": "#e0a030", "wrong": "#c03030"}
    _, axes = plt.subplots(figsize=(9, 0.32 * len(names) + 1.2))
    left = dict.fromkeys(names, 0)
    for kind, colour in kinds.items():
        counts = Counter(what(row) for row in rows if ("wrong" if row["wrong"] else row["outcome"]) == kind)
        widths = [counts[name] for name in names]
        axes.barh(names, widths, left=[left[name] for name in names], color=colour, label=f"{kind}: {sum(widths)}")
        left = {name: left[name] + counts[name] for name in names}
    axes.invert_yaxis()
    axes.set_xlabel("rounds (refused: no usable checkpoint was left, exit code 78)")
    axes.legend(loc="lower right")
    plt.tight_layout()
    plt.savefig(HERE / "faults.png", dpi=100)


def what(row: dict) -> str:
    return row["fault"] + (f" + {row['damage']}" if row.get("damage") else "")


if __name__ == "__main__":
    for word in sys.argv[1:]:
        {"faults": faults, "zero3": zero3, "bench": bench, "draw": draw}[word]()
