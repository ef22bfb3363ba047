"""Writes `levels.json` and `levels.png` beside itself: what each level of an RQ-VAE adds to images of `shapes`.

python tests/reports/rq_cpu_202611/levels.py TOKENIZER
"""

import json
import math
import sys
from pathlib import Path

import torch

from tokscale.data.raw.shapes import caption, render, sample_scene
from tokscale.evaluation.shapes_judge import read_scenes, score
from tokscale.inference.grids import save_grid
from tokscale.tokenizers.codec import to_uint8
from tokscale.tokenizers.image import load_image_tokenizer

HERE = Path(__file__).parent
IMAGES, SHOWN = 128, 8


def main(folder: str) -> None:
    tokenizer = load_image_tokenizer(folder)
    scenes = [sample_scene(0, index, "validation") for index in range(IMAGES)]
    images, captions = (
        torch.stack([render(scene, tokenizer.image_size) for scene in scenes]),
        list(map(caption, scenes)),
    )
    codes, rows, shown = tokenizer.encode(images), [], [images[:SHOWN]]
    for levels in range(1, tokenizer.code_shape[2] + 1):
        with torch.no_grad():
            rebuilt = to_uint8(tokenizer.codec.decode_to_unit_range(codes[..., :levels]))
        error = ((images.float() - rebuilt.float()) / 255).square().mean().item()
        accuracy = score(captions, read_scenes(rebuilt))
        rows.append(
            {
                "levels": levels,
                "mean_squared_error": error,
                "psnr": -10 * math.log10(error),
                "exact_one_thing": accuracy["seen"]["exact"],
                "exact_two_things": accuracy["two_objects"]["seen"]["exact"],
            }
        )
        shown.append(rebuilt[:SHOWN])
    about = {"tokenizer": tokenizer.fingerprint, "code_shape": tokenizer.code_shape, "images": IMAGES}
    (HERE / "levels.json").write_text(json.dumps(about | {"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    labels = ["image"] * SHOWN + [f"levels: {levels}" for levels in range(1, len(shown)) for _ in range(SHOWN)]
    save_grid(torch.cat(shown), labels, HERE / "levels.png", columns=SHOWN, side=64)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main(sys.argv[1])
