"""How many kernels a layer and a token take: no more than is stored in `launches.json` for this version of torch.

Counted as a difference, so that what a model does once does not count. A lower count is stored by
`python tests/fake_cuda/test_fake_launches.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import fake_device

    sys.path.insert(0, str(Path(__file__).parents[1]))
    assert (WHY_NOT := fake_device.load()) is None, WHY_NOT

import pytest
import torch
from ledger import DEVICE, Ledger, fake_cuda, forget_tables, to_cuda
from model_cases import BASES, DEEPER, OURS, base, draw, tokens, write

from tokscale.base.batch import ImageBatch
from tokscale.base.config import Config
from tokscale.models.registry import build_model
from tokscale.nn.attention.relative import Places
from tokscale.nn.attention.relative_flex import biased_attention

STORED = Path(__file__).with_name("launches.json")
VERSION = ".".join(torch.__version__.split(".")[:2])
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in BASES},
    "dalle without shift": {"shift_tokens": False},
    "dalle reversible": {"reversible": True},
    "parti without bias": {"rel_pos_bias": False, "multi_query": False},
}


def count(name: str) -> dict[str, float]:
    """Kernels of one more layer: forward, backward, for the codes of an image, and for a caption that is written."""
    kind = name.split()[0]
    shallow, deep = (base(kind, **VARIANTS[name], **more) for more in ({}, DEEPER[kind][0]))
    (forward, backward), (more_forward, more_backward) = _trained(shallow), _trained(deep)
    layers = DEEPER[kind][1]
    found = {"forward": (more_forward - forward) / layers, "backward": (more_backward - backward) / layers}
    if not isinstance(tokens(shallow), ImageBatch):
        found["drawing"] = (_drawn(deep) - _drawn(shallow)) / layers
    if hasattr(OURS[kind], "generate_texts"):
        found["writing"] = (_written(deep) - _written(shallow)) / layers
    return {what: round(value, 2) for what, value in found.items()}


def _trained(config: Config) -> tuple[int, int]:
    forget_tables()
    model: Any = to_cuda(build_model(config), torch.bfloat16).train()
    with Ledger() as forward:
        loss = model(tokens(config)).total
    with Ledger() as backward:
        loss.backward()
    return forward.kernels, backward.kernels


def _drawn(config: Config) -> int:
    forget_tables()
    model = to_cuda(build_model(config), torch.bfloat16).eval()
    with Ledger() as ledger:
        next(draw(model, config, {"cond_scale": 1.0}))
    return ledger.kernels


def _written(config: Config) -> int:
    forget_tables()
    model: Any = to_cuda(build_model(config), torch.bfloat16).eval()
    with Ledger() as ledger:
        write(model, model.sampling_config())
    return ledger.kernels


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", VARIANTS)
def test_no_more_kernels_than_stored(name: str) -> None:
    stored = json.loads(STORED.read_text()).get(VERSION)
    if stored is None:
        pytest.skip(f"no counts stored for torch {VERSION}: python tests/fake_cuda/test_fake_launches.py")
    found = count(name)
    more = {what: (value, stored[name][what]) for what, value in found.items() if value > stored[name][what]}
    assert not more, f"{name}: more kernels a layer than stored (found, stored): {more}"


def _relative(batch: int, side: int) -> int:
    """Kernels of one layer's attention with a bias for every offset, forward and backward."""
    forget_tables()
    places, heads = Places(side, side), 16
    shapes = [(batch, heads, side**2, 64), *[(batch, 1, side**2 + 1, 64)] * 2]
    given = [torch.ones(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    table = torch.ones(places.rows, heads, device=DEVICE, requires_grad=True)
    biased_attention(*given, table, places)  # its block mask is made once and kept
    with Ledger() as ledger:
        biased_attention(*given, table, places).sum().backward()
    return ledger.kernels


@pytest.mark.usefixtures("cuda")
def test_attention_with_a_bias_is_a_few_kernels_whatever_the_image() -> None:
    few = _relative(2, 4)
    assert few == _relative(8, 32) <= 8


@pytest.mark.usefixtures("cuda")
def test_deterministic_attention_with_a_bias_reduces_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert 20 < _relative(2, 4) < 60


if __name__ == "__main__":
    with fake_cuda():
        counts = {name: count(name) for name in VARIANTS}
    known = json.loads(STORED.read_text()) if STORED.exists() else {}
    STORED.write_text(json.dumps(known | {VERSION: counts}, indent=1, sort_keys=True) + "\n")
