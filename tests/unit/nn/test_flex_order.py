"""How positions are reordered so that FlexAttention's blocks of 128 can be skipped. The kernel itself is a GPU's."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tokscale.base.config import decode
from tokscale.nn.attention import flex
from tokscale.nn.attention.pattern import KINDS, AttentionPattern
from tokscale.nn.attention.reference import dense_attention
from tokscale.nn.attention.sparsity import SparseLayout
from tokscale.nn.layout import TokenLayout

LAYOUT = TokenLayout(70, 16, 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [LAYOUT.seq, LAYOUT.seq - 1, 71, 40])
def test_the_reordered_mask_is_the_pattern(kind: str, length: int):
    pattern = AttentionPattern(kind, LAYOUT)
    order = flex.token_order(pattern, length)
    assert sorted(order[order >= 0].tolist()) == list(range(length))
    slots = torch.arange(len(order))
    zero = torch.zeros((), dtype=torch.long)
    seen = flex.mask_function(pattern, order)(zero, zero, slots[:, None], slots[None])
    expected = torch.zeros(len(order), len(order), dtype=torch.bool)
    real = (order >= 0).nonzero().flatten()
    places = order[real]
    expected[real[:, None], real] = pattern.dense(length, "cpu")[0][places[:, None], places]
    assert torch.equal(seen, expected)


def test_columns_become_contiguous():
    pattern = AttentionPattern("axial_col", TokenLayout(128, 32, 32))
    raster = torch.arange(pattern.layout.seq)
    assert flex.live_blocks(pattern, raster) == 45  # all of the triangle
    assert flex.live_blocks(pattern, flex.token_order(pattern, len(raster))) == 17


def test_the_text_is_padded_to_a_block_where_that_saves_blocks():
    pattern = AttentionPattern("axial_row", TokenLayout(257, 64, 64))
    order = flex.token_order(pattern, pattern.layout.seq)
    assert len(order) == 384 + 4096
    full = AttentionPattern("full", TokenLayout(257, 64, 64))
    assert len(flex.token_order(full, full.layout.seq)) == 257 + 4096


def gaps(device: str, kind: str, options: str) -> list[float]:
    """Relative distance from the oracle, of the output and on a GPU of the gradients, in a process of its own.

    The compiler cannot see through the shape checks that tests put around every function.
    """
    command = [sys.executable, __file__, device, kind, options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize(("kind", "options"), [("axial_col", "null"), ("sparse", '{"kind": "fixed", "block": 16}')])
def test_compiled_attention_is_the_oracle(kind: str, options: str):
    assert max(gaps("cpu", kind, options)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.is_full])
def test_gradients_on_a_gpu_are_the_oracles(kind: str):
    assert max(gaps("cuda", kind, "null")) < 1e-2


def _measure(device: str, kind: Any, options: str) -> None:
    sparse = decode(SparseLayout, json.loads(options) or {"kind": "variable"})
    pattern = AttentionPattern(kind, LAYOUT, heads=2, sparse=sparse)
    leaves = [torch.randn(1, 2, LAYOUT.seq, 32, device=device, requires_grad=device == "cuda") for _ in range(3)]
    weight = torch.randn_like(leaves[0])
    results = []
    for run in (flex.block_attention, dense_attention):
        out = run(*leaves, pattern)
        results.append([out, *(torch.autograd.grad(out, leaves, weight) if out.requires_grad else ())])
    print(json.dumps([((one - other).norm() / other.norm()).item() for one, other in zip(*results, strict=True)]))


if __name__ == "__main__":
    _measure(*sys.argv[1:])
