"""What models say of the rows of their tables: all that depends on vocabularies, grids and caption lengths."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokscale.base.config import decode
from tokscale.models.registry import ModelConfig, build_model

SMALL = {"dim": 16, "heads": 2, "dim_head": 8}
TOLD = {"condition": {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}}
CLASSES = {"condition": {"kind": "classes", "num_classes": 5}}
CASES: dict[str, tuple[dict[str, Any], str, int]] = {
    "dalle": ({"kind": "dalle", "depth": 1, "rotary_emb": False}, "text_seq_len", 0),
    "dalle tied": ({"kind": "dalle", "depth": 1, "share_input_output_emb": True}, "text_seq_len", 0),
    "maskgit": (
        {"kind": "maskgit", "depth": 1, "token_critic": {"dim": 16, "depth": 1, "heads": 2}, **TOLD},
        "text_seq_len",
        0,
    ),
    "maskgit classes": ({"kind": "maskgit", "depth": 1, **CLASSES}, "text_seq_len", 0),
    "parti": ({"kind": "parti", "depth": 1, **TOLD}, "max_text_len", 0),
    "rq": ({"kind": "rqtransformer", "spatial_layers": 1, "depth_layers": 1, **TOLD}, "text_seq_len", 2),
    "rq tables": (
        {"kind": "rqtransformer", "spatial_layers": 1, "depth_layers": 1, "shared_code_emb": False, **CLASSES},
        "text_seq_len",
        2,
    ),
}


def model(case: str, codes: int, grid: tuple[int, int], words: int, length: int) -> torch.nn.Module:
    values, key, levels = CASES[case]
    image = SimpleNamespace(num_tokens=codes, code_shape=(*grid, levels) if levels else grid, image_size=0, channels=3)
    config: Any = decode(ModelConfig, {**SMALL, **values, key: length})
    with torch.device("meta"):
        return build_model(config.fitted(image, SimpleNamespace(num_tokens=words)))


@pytest.mark.parametrize("case", CASES)
def test_every_table_that_depends_on_a_size_is_named_with_all_its_rows(case):
    one, other = model(case, 12, (4, 5), 300, 6), model(case, 17, (6, 7), 311, 9)
    shapes = {name: tuple(p.shape) for name, p in one.named_parameters()}
    differing = {name for name, p in other.named_parameters() if tuple(p.shape) != shapes[name]}
    assert differing and differing <= one.rows().keys()
    for built in (one, other):
        sizes = {name: len(p) for name, p in built.named_parameters()}
        assert {name: sum(part.count for part in rows) for name, rows in built.rows().items()} == {
            name: sizes[name] for name in built.rows()
        }
