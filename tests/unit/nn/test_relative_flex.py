"""Attention with a bias per 2-D offset as FlexAttention computes it, against every score at once.

On a CPU it has no backward pass by its own account; the one that it runs uncompiled is taken all the same, since the
score function's derivative is what is asked for here.
"""

import json
import os
import subprocess
import sys

import pytest

CASES = [("raster", 43, 1), ("raster", 42, 4), ("raster", 7, 2), ("sequence", 42, 1), ("sequence", 5, 4)]


def told(what: str) -> dict:
    """What a process of its own found: the compiler cannot see through the shape checks of tests."""
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_output_and_gradients_are_the_dense_oracles():
    for case, gaps in told("gaps").items():
        assert max(gaps) < 1e-5, case
        assert len(gaps) == 5, case


def test_a_compiled_function_serves_all_layers_and_batches():
    found = told("compiled")
    assert found["compilations"] <= 2 and found["gap"] < 1e-5
    assert found["beyond the limit"] < 1e-5 and len(found["warnings"]) == 1


@pytest.mark.parametrize(
    ("device", "trains", "deterministic", "length", "fits"),
    [
        ("cuda", True, False, 12, True),
        ("cuda", True, False, 3, True),
        ("cuda", True, True, 12, False),  # its gradient of the table adds up in any order
        ("cuda", False, True, 12, True),
        ("cuda", False, False, 3, False),  # a compilation for each length of a beginning
        ("cpu", True, False, 12, False),
    ],
)
def test_where_it_is_taken(device, trains, deterministic, length, fits, monkeypatch):
    import torch

    from tokscale.nn.attention import relative_flex
    from tokscale.nn.attention.relative import Places

    monkeypatch.setattr(relative_flex, "find_spec", lambda name: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)

    class Query:
        dtype, shape = torch.bfloat16, (1, 1, length, 8)

    query = Query()
    query.device = torch.device(device)
    take = getattr(relative_flex.flex_fits, "__wrapped__", relative_flex.flex_fits)
    assert take(query, Places(3, 4), trains=trains) == fits


def _inputs(index: str, length: int, kv_heads: int) -> tuple:
    import torch

    from tokscale.nn.attention.relative import Places

    torch.manual_seed(0)
    places = Places(6, 7, index)
    shapes = [(2, 4, length, 16), *[(2, kv_heads, length + 1, 16)] * 2, (places.rows, 4)]
    return places, [torch.randn(shape).requires_grad_() for shape in shapes]


def _gaps() -> dict:
    import torch
    from torch.nn.attention import flex_attention as library

    from tokscale.nn.attention.relative import dense_relative_attention
    from tokscale.nn.attention.relative_flex import _mask, score_function

    library._validate_device = lambda query, key, value: None
    found = {}
    for case in CASES:
        places, given = _inputs(*case)
        q, k, v, table = given
        mask, score = _mask(q.shape[2], "cpu"), score_function(table, places)
        out = library.flex_attention(q, k, v, score_mod=score, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        wanted = dense_relative_attention(*given, places)
        direction = torch.randn_like(wanted)
        grads, want = (torch.autograd.grad((y * direction).sum(), given) for y in (out, wanted))
        pairs = [(out, wanted), *zip(grads, want, strict=True)]
        found[str(case)] = [float((a - b).detach().abs().max()) for a, b in pairs]
    return found


def _compiled() -> dict:
    import logging

    import torch

    from tokscale.nn.attention import relative_flex
    from tokscale.nn.attention.relative import dense_relative_attention

    compiled, warnings, gaps = [], [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Keep(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())

    logging.getLogger("tokscale.attention").addHandler(Keep())
    relative_flex._COMPILE["backend"] = backend
    relative_flex.flex_fits = lambda q, places, *, trains: True
    places, given = _inputs("raster", 43, 1)
    q, k, v, table = (tensor.detach() for tensor in given)

    def gap(*given) -> float:
        with torch.no_grad():
            out = relative_flex.biased_attention(*given, places)
            return float((out.float() - dense_relative_attention(*given, places).float()).abs().max())

    for rows in (2, 1):
        for layer in range(3):
            gaps.append(gap(q[:rows], k[:rows], v[:rows], table + layer))
    count = len(compiled)
    torch._dynamo.config.recompile_limit = 1
    relative_flex._compiled.cache_clear()
    beyond = [gap(q[:, :, :length], k[:, :, : length + 1], v[:, :, : length + 1], table) for length in (43, 42, 41)]
    return {"compilations": count, "gap": max(gaps), "beyond the limit": max(beyond), "warnings": warnings}


if __name__ == "__main__":
    print(json.dumps({"gaps": _gaps, "compiled": _compiled}[sys.argv[1]]()))
