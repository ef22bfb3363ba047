"""The four quickstart models side by side: trained, asked the six questions of `gen6`, and compared with real images.

    python tests/reports/quickstart_cpu_202611/side_by_side.py SCRATCH [MODEL ...]

runs every stage of `recipe=quickstart/<model>` on one thread below SCRATCH, going on where it was (a model whose
`report.json` is there is measured), and writes
`side_by_side/README.md`, `report.json` and sheets of each model's images beside itself. DALL-E, MaskGIT and Parti share
data and tokenizers. It takes more than an hour of an idle core.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tokscale.evaluation.gen6 import TASKS

HERE = Path(__file__).parent / "side_by_side"
MODELS = ("dalle", "maskgit", "parti", "rq")
IMAGES = 1000
"""Real images, and as many drawn for their captions."""


def run(*words: str) -> None:
    """A stage on one thread."""
    print("$ tokscale", *words, flush=True)
    one = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "tokscale", *words], check=True, env=os.environ | one)


def measured(model: str, scratch: Path) -> dict:
    """Train and evaluate one model, unless that was done."""
    own, first = scratch / model, scratch / "dalle"
    owner = first if model != "rq" else own
    keys = [f"recipe=quickstart/{model}", f"run_dir={own}", f"data_dir={owner / 'data'}"]
    if owner != own:
        keys += [f"{kind}_tokenizer={first / f'{kind}_tokenizer'}" for kind in ("image", "text")]
    else:
        for stage in ("prepare", "train-tokenizer", "tokenize"):
            run(stage, *keys)
    if not (own / "report.json").exists():
        for stage in ("train", "export", "sample"):
            run(stage, *keys)
        run("evaluate", *keys, "gen6=4", f"reference={scratch / 'reference/raw'}", f"count={IMAGES}")
    for name in ("gen6", "beside"):
        shutil.copy(own / f"samples/{name}.png", HERE / f"{model}-{name}.png")
    return json.loads((own / "report.json").read_text())


def table(reports: dict[str, dict]) -> str:
    """One row a number, one column a model."""

    def interval(entry: dict) -> str:
        low, high = entry["interval"]
        return f"{entry['accuracy']:.2f} [{low:.2f}, {high:.2f}]"

    def kid(row: dict) -> str:
        return f"{1e3 * row['kid']:.1f} ± {1e3 * row['kid_error']:.1f}"

    def accuracy(report: dict) -> str:
        one, two = report["prompt_accuracy"], report["prompt_accuracy"]["two_objects"]
        return " / ".join(f"{found[split]['exact']:.2f}" for found in (one, two) for split in ("seen", "held_out"))

    rows = {f"gen6, {task}": lambda r, task=task: interval(r["gen6"][task]) for task in (*TASKS, "overall")}
    rows |= {
        "prompt accuracy: one thing seen / held out / two seen / held out": accuracy,
        "KID x 1000: drawn": lambda r: kid(r["images"]["drawn"]),
        "KID x 1000: reconstructed by the tokenizer alone": lambda r: kid(r["images"]["reconstructed"]),
        "PSNR of the reconstructions, dB": lambda r: f"{r['images']['reconstructed']['psnr']:.1f}",
        "KID x 1000: other real images": lambda r: kid(r["images"]["real"]),
        "precision, recall of drawn": lambda r: ", ".join(
            f"{r['images']['drawn'][name]:.2f}" for name in ("precision", "recall")
        ),
        "held-out loss": lambda r: f"{r['held_out_losses']['total']:.4f}",
        "seconds of training": lambda r: f"{r['seconds']['train']:.0f}",
    }
    lines = [["", *reports], ["---"] * (len(reports) + 1)]
    lines += [[name, *(show(report) for report in reports.values())] for name, show in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """See the module."""
    scratch, models = Path(sys.argv[1]).resolve(), sys.argv[2:] or MODELS
    HERE.mkdir(exist_ok=True)
    place = [f"data_dir={scratch / 'reference'}", f"run_dir={scratch / 'reference'}"]
    run("prepare", *place, f"source={{kind: shapes, count: {2 * IMAGES}, split: validation}}")
    reports = {model: measured(model, scratch) for model in models}
    (HERE / "report.json").write_text(json.dumps(reports, indent=1) + "\n")
    sheets = "\n\n".join(
        f"## {model}\n\nReal, rebuilt, drawn:\n\n![]({model}-beside.png)\n\ngen6:\n\n![]({model}-gen6.png)"
        for model in models
    )
    words = (
        "Made by `tests/reports/quickstart_cpu_202611/side_by_side.py`: one seed, one thread, "
        f"{IMAGES:,} images of each kind for KID (± is one standard error); brackets are 95 % intervals over prompts. "
        "DALL-E, MaskGIT and Parti share a tokenizer; losses of different models do not compare. Beside the "
        "originals: [the race](../../race_cpu_202611/README.md).\n\n"
        "`counting` asks for two, three or four things alike. The quickstart's data never show two things alike nor "
        "more than two: what stands there is what chance gives. The other five tasks are sentences of its captions; "
        "`report.json` says of each what share of its prompts training shows (`shown`)."
    )
    (HERE / "README.md").write_text(f"# The quickstart's four models\n\n{table(reports)}\n\n{words}\n\n{sheets}\n")


if __name__ == "__main__":
    main()
