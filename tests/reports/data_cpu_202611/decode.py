"""The decoding rows of `bench tokenize` alone, with the time of each part.

`python tests/reports/data_cpu_202611/decode.py` writes `decode.json` beside itself.
"""

import io
import json
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from tokscale.bench.measure import interleaved
from tokscale.bench.tokenize import TokenizeBench, _decoding, _jpeg, _natural
from tokscale.data.raw.images import decode_image, resize

values = np.random.default_rng(0)
jpegs = [_jpeg(_natural(values, 512)) for _ in range(32)]
rows = _decoding(TokenizeBench(rounds=8), jpegs, "512-to-256")
pixels, images = [decode_image(data) for data in jpegs], [Image.open(io.BytesIO(data)) for data in jpegs]
parts = interleaved(
    {
        "simplejpeg decodes": lambda: [simplejpeg.decode_jpeg(data, "RGB") for data in jpegs],
        "torch resizes": lambda: [resize(image, (256, 256)) for image in pixels],
        "Pillow decodes": lambda: [Image.open(io.BytesIO(data)).convert("RGB") for data in jpegs],
        "Pillow resizes": lambda: [image.resize((256, 256), Image.Resampling.BICUBIC) for image in images],
    },
    8,
)
milliseconds = {name: round(1000 * seconds / len(jpegs), 3) for name, seconds in parts.items()}
about = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
found = {"env": about, "rows": rows, "milliseconds_per_image": milliseconds}
Path(__file__).with_name("decode.json").write_text(json.dumps(found, indent=2) + "\n")
print(json.dumps(found, indent=1))
