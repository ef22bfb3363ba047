"""How often FlexAttention is compiled on the way of a user: PyTorch refuses the ninth time. A counter compiles here."""

import json
import os
import subprocess
import sys

MOST_PER_PATTERN = 3
"""For many samples, for a single one, and for one more in training."""


def told(what: str) -> dict:
    """What a process of its own found: the compiler cannot see through the shape checks of tests."""
    command = [sys.executable, __file__, what]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_evaluating_sampling_and_priming_compile_a_few_functions():
    found = told("pipeline")
    assert 0 < found["compilations"] <= MOST_PER_PATTERN * found["patterns"]
    assert found["gap"] < 1e-5 and not found["warnings"]


def test_beyond_the_limit_the_exact_slow_path_is_taken_and_said_once():
    found = told("limit")
    assert found["compilations"] == 1
    assert found["gap"] < 1e-5
    assert len(found["warnings"]) == 1 and "axial_row attention was compiled 1 times" in found["warnings"][0]


def test_layouts_with_other_random_blocks_share_a_function():
    assert told("layouts")["compilations"] == 1


def _count() -> tuple[list, list]:
    import logging

    from tokscale.nn.attention import flex

    compiled, warnings = [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Keep(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())

    flex._COMPILE["backend"] = backend
    logging.getLogger("tokscale.attention").addHandler(Keep())
    return compiled, warnings


def _pipeline() -> dict:
    """`evaluate`, then `sample`, then priming, with the kinds of dalle/paper_12b."""
    import torch

    from tokscale.base.batch import TokenBatch
    from tokscale.models.dalle import DALLE, DALLEConfig, DALLESampling

    compiled, warnings = _count()
    sizes = {"dim": 32, "depth": 3, "heads": 2, "dim_head": 16, "text_seq_len": 8, "num_text_tokens": 100}
    sizes |= {"num_image_tokens": 64, "image_grid": (4, 4), "attn_types": ("axial_row", "axial_col", "conv_like")}
    torch.manual_seed(0)
    config = DALLEConfig(**sizes, kernel_size=3, attn_backend="flex", shift_tokens=False)
    model = DALLE(config).eval()
    oracle = DALLE(config.model_copy(update={"attn_backend": "dense"})).eval()
    oracle.load_state_dict(model.state_dict())

    def batch(count: int) -> TokenBatch:
        text = torch.randint(1, 100, (count, 8))
        return TokenBatch(torch.arange(count), text, text > 0, torch.randint(0, 64, (count, 4, 4)))

    gaps = []
    for count in (4, 3, 1):
        with torch.no_grad():
            asked = batch(count)
            gaps.append(abs(float(model(asked).total) - float(oracle(asked).total)))
    for count in (4, 2, 1):
        for primed in (None, 1, 3, 5, 7, 12):
            asked, how = batch(count), DALLESampling(cond_scale=3.0 if primed is None else 1.0)
            how = how.model_copy(update={"num_init_img_tokens": primed})
            img, seeds = (None if primed is None else asked.codes), range(count)
            codes = [
                m.generate_codes(asked.text, asked.text_mask, options=how, seeds=seeds, img=img)
                for m in (model, oracle)
            ]
            gaps.append(float((codes[0] != codes[1]).float().mean()))
    return {"compilations": len(compiled), "patterns": 3, "gap": max(gaps), "warnings": warnings}


def _limit() -> dict:
    import torch

    from tokscale.nn.attention.flex import block_attention
    from tokscale.nn.attention.pattern import AttentionPattern
    from tokscale.nn.attention.reference import dense_attention
    from tokscale.nn.layout import TokenLayout

    compiled, warnings = _count()
    torch._dynamo.config.recompile_limit = 1
    pattern, gaps = AttentionPattern("axial_row", TokenLayout(5, 4, 4), heads=2), []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k, v = (torch.randn(2, 2, 21, 16, dtype=dtype) for _ in range(3))
            gap = block_attention(q, k, v, pattern).float() - dense_attention(q, k, v, pattern).float()
            gaps.append(float(gap.abs().max()) if dtype == torch.float32 else 0.0 * float(gap.sum()))
    return {"compilations": len(compiled), "gap": max(gaps), "warnings": warnings}


def _layouts() -> dict:
    import torch

    from tokscale.base.config import decode
    from tokscale.nn.attention.flex import block_attention
    from tokscale.nn.attention.pattern import AttentionPattern
    from tokscale.nn.attention.sparsity import SparseLayout
    from tokscale.nn.layout import TokenLayout

    compiled, _ = _count()
    sparse = decode(SparseLayout, {"kind": "variable", "block": 4})
    with torch.no_grad():
        for stream in range(5):
            pattern = AttentionPattern("sparse", TokenLayout(5, 4, 4), heads=2, sparse=sparse, stream=stream)
            block_attention(*(torch.randn(2, 2, 21, 16) for _ in range(3)), pattern)
    return {"compilations": len(compiled)}


if __name__ == "__main__":
    print(json.dumps({"pipeline": _pipeline, "limit": _limit, "layouts": _layouts}[sys.argv[1]]()))
