"""What trained tokenizers keep of images of `shapes` that training never saw, as a table and as images.

`python tests/reports/tokenizers_cpu_202611/run.py COMMIT RUN_DIR ...` reads each run's `image_tokenizer` and training
record, and writes `report.json` and one sheet for each beside itself. Residual tokenizers are measured level by level.
"""

import json
import platform
import sys
from pathlib import Path

import torch

from tokscale.data.raw.shapes import caption, render, sample_scene
from tokscale.evaluation.quality import quality
from tokscale.evaluation.shapes_judge import read_scenes, score
from tokscale.inference.grids import save_grid
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.image import load_image_tokenizer

HERE = Path(__file__).parent
IMAGES, SHOWN = 512, 8


def held_out(size: int) -> tuple[list[str], torch.Tensor]:
    """Captions and images of the validation split."""
    scenes = [sample_scene(0, index, "validation") for index in range(IMAGES)]
    return [caption(scene) for scene in scenes], torch.stack([render(scene, size) for scene in scenes])


def rebuilt(tokenizer: FrozenImageTokenizer, codes: torch.Tensor, levels: int | None) -> torch.Tensor:
    """Images of codes; of residual codes, of the first `levels` alone."""
    if levels is None:
        return tokenizer.decode(codes)
    with torch.inference_mode():
        return (tokenizer.codec.decode_to_unit_range(codes[..., :levels]).clamp(0, 1) * 255).round().to(torch.uint8)


def measured(run_dir: Path) -> dict:
    """The figures of one tokenizer."""
    tokenizer = load_image_tokenizer(run_dir / "image_tokenizer")
    captions, images = held_out(tokenizer.image_size)
    codes = tokenizer.encode(images)
    depth = tokenizer.code_shape[2:]
    rows, shown = {}, [images[:SHOWN]]
    for levels in range(1, depth[0] + 1) if depth else [None]:
        out = rebuilt(tokenizer, codes, levels)
        accuracy = score(captions, read_scenes(out))
        rows[str(levels or "all")] = {
            "one_object_exact": accuracy["seen"]["exact"],
            "two_objects_exact": accuracy["two_objects"]["seen"]["exact"],
            **quality(images, out),
        }
        shown.append(out[:SHOWN])
    labels = [text for row in ["image", *(f"level {name}" for name in rows)] for text in [row] * SHOWN]
    save_grid(torch.cat(shown), labels, HERE / f"{run_dir.name}.png", columns=SHOWN, side=64)
    lines = (run_dir / "train-tokenizer/metrics.jsonl").read_text().splitlines()
    return {
        "config": json.loads((run_dir / "image_tokenizer/config.json").read_text()),
        "command": (run_dir / "train-tokenizer/command.txt").read_text().strip(),
        "code_shape": tokenizer.code_shape,
        "codes_used": len(codes.unique()),
        "by_levels": rows,
        "last_metrics": json.loads(lines[-1]),
    }


if __name__ == "__main__":
    report = {
        "commit": sys.argv[1],
        "hardware": "2 cores AMD EPYC (Zen 3), AVX2; one rank, one thread; other jobs ran beside it",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "images": IMAGES,
        "tokenizers": {Path(name).name: measured(Path(name)) for name in sys.argv[2:]},
    }
    (HERE / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, found in report["tokenizers"].items():
        for levels, row in found["by_levels"].items():
            print(name, levels, {key: round(value, 3) for key, value in row.items()})
