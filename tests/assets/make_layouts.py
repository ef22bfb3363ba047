"""Writes `layouts.npz`: the block layouts of DeepSpeed 0.19.6, the last release that had sparse attention.

Its `sparsity_config.py` needs nothing but torch, and runs alone:

    pip download --no-deps --no-binary :all: deepspeed==0.19.6
    tar xzf deepspeed-0.19.6.tar.gz deepspeed-0.19.6/deepspeed/ops/sparse_attention/sparsity_config.py
    python tests/assets/make_layouts.py deepspeed-0.19.6/deepspeed/ops/sparse_attention/sparsity_config.py
"""

import itertools
import json
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HEADS, BLOCK = 4, 16
CLASSES = {
    "dense": "DenseSparsityConfig",
    "fixed": "FixedSparsityConfig",
    "variable": "VariableSparsityConfig",
    "bigbird": "BigBirdSparsityConfig",
    "bslongformer": "BSLongformerSparsityConfig",
    "local_sliding_window": "LocalSlidingWindowSparsityConfig",
}
HORIZONTAL = {"horizontal_global_attention": True}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "fixed": [
        {},
        {"num_local_blocks": 6, "num_global_blocks": 2},
        {"different_layout_per_head": True, "num_different_global_patterns": 3},
        HORIZONTAL,
    ],
    "variable": [
        {"num_random_blocks": 0, "global_block_indices": [0]},
        {"num_random_blocks": 5, "local_window_blocks": [2, 3, 5], "global_block_indices": [0, 4, 99]},
        {"num_random_blocks": 3, "global_block_indices": [0, 7], "global_block_end_indices": [3, 9]},
        {"num_random_blocks": 2, "global_block_indices": [1], "different_layout_per_head": True},
        {"num_random_blocks": 0, "global_block_indices": [2]} | HORIZONTAL,
    ],
    "bigbird": [
        {},
        {"different_layout_per_head": True},
        {"num_random_blocks": 3, "num_sliding_window_blocks": 5, "num_global_blocks": 2},
    ],
    "bslongformer": [
        {"global_block_indices": [0]},
        {"num_sliding_window_blocks": 5, "global_block_indices": [0, 8], "global_block_end_indices": [2, 9]},
    ],
    "local_sliding_window": [{}, {"num_sliding_window_blocks": 6}],
}


def cases() -> Iterator[dict[str, Any]]:
    for kind, causal, blocks in itertools.product(CLASSES, (False, True), (20, 23)):
        for options in OPTIONS[kind]:
            if causal and "horizontal_global_attention" in options:
                continue  # refused there, and here
            if causal and kind == "bigbird" and options.get("num_random_blocks", 1) > 1:
                continue  # raises there: its first row has one block to draw three from
            for seed in range(3 if kind == "bigbird" or options.get("num_random_blocks") else 1):
                yield {"kind": kind, "causal": causal, "blocks": blocks, "options": options, "seed": seed}


def main(source: str) -> None:
    module = runpy.run_path(source)
    arrays: dict[str, np.ndarray] = {}
    for index, case in enumerate(cases()):
        arguments = {"num_heads": HEADS, "block": BLOCK, **case["options"]}
        if case["kind"] != "dense":
            arguments["attention"] = "unidirectional" if case["causal"] else "bidirectional"
        random.seed(case["seed"])
        layout = module[CLASSES[case["kind"]]](**arguments).make_layout(case["blocks"] * BLOCK)
        arrays[f"{index}/case"] = np.array(json.dumps(case))
        arrays[f"{index}/bits"] = np.packbits(layout.bool().numpy())
    np.savez_compressed(Path(__file__).with_name("layouts.npz"), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
