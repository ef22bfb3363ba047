"""Makes `tests/assets/format1` with the code of commit 02310aa: artefacts as they were before format 2.

    git worktree add /tmp/old 02310aa
    PYTHONPATH=/tmp/old:/tmp/old/tests python tests/assets/make_format1.py

Two runs of one tiny DALL-E: `run` holds a checkpoint of step 2, `expected.json` the losses of steps 3 and 4 of the run
that went on, and the codes that the export of step 2 draws.
"""

import json
import os
import shutil
from pathlib import Path

import tiny_road  # type: ignore[import-not-found]  # of the old commit

import tokscale
from tokscale.base.config import decode
from tokscale.dist.env import ProcessEnv
from tokscale.stages import export, train
from tokscale.tokenizers.image import load_image_tokenizer, save_image_tokenizer
from tokscale.train.metrics import read_metrics

ALONE = ProcessEnv()
MODEL = tiny_road.MODEL | {
    "dim": 8,
    "dim_head": 6,
    "attn_types": ["full", "conv_like"],
    "conv_window": "seed",
    "kernel_size": 3,
    "rotary_emb": True,
}
PROMPTS = ["a small red circle", "a large blue circle"]
OUT = Path(__file__).absolute().parent / "format1"
WORK = Path("/tmp/format1")


def config(run_dir: Path, steps: int) -> train.TrainConfig:
    values = {
        "run_dir": run_dir,
        "data_dir": Path("data"),
        "image_tokenizer": Path("image_tokenizer"),
        "text_tokenizer": Path("text_tokenizer"),
        "model": MODEL,
        "optim": {"lr": 1e-2},
        "schedule": {"kind": "constant"},
        "engine": {"kind": "eager", "ema": [0.9]},
        "loop": {"total_steps": steps, "log_every": 1},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "batch_size": 8,
    }
    return decode(train.TrainConfig, values)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    os.chdir(WORK)  # checkpoints keep absolute paths, which should not be those of a person's checkout
    tiny_road.make_road(Path("."))
    codec = load_image_tokenizer("image_tokenizer")
    save_image_tokenizer(codec.resized((16, 8)), "resized_tokenizer")
    train.run(config(Path("run"), 2), ALONE)
    export.run(export.ExportConfig(run_dir=Path("run"), out=Path("export")), ALONE)
    shutil.copytree("run", "longer")
    train.run(config(Path("longer"), 4), ALONE)
    model = tokscale.load("export")
    text, mask, extra = model.prompts(PROMPTS)
    codes = model.model.generate_codes(text, mask, options=model.model.sampling_config(), seeds=[0, 1], extra=extra)
    expected = {
        "losses": [row["loss"] for row in read_metrics(Path("longer"))],
        "prompts": PROMPTS,
        "codes": codes.tolist(),
        "pixels_sum": int(model.image_tokenizer.decode(codes).long().sum()),
        "fingerprint": codec.fingerprint,
        "resized_fingerprint": load_image_tokenizer("resized_tokenizer").fingerprint,
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree("longer")
    for name in ("logs", "heartbeats", "tensorboard", "command.txt", "env.json", "starts.jsonl"):
        path = Path("run", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.copytree(WORK, OUT)


if __name__ == "__main__":
    main()
