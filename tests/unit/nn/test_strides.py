"""Weights laid out for decoding: another order in memory, the same values."""

import torch
from torch import nn

from tokscale.models.dalle import DALLE, DALLEConfig, DALLESampling
from tokscale.nn.head import VocabularyHead
from tokscale.nn.strides import transpose_weights_for_decoding


def test_linear_weights_lie_input_by_input_and_nothing_else_changes():
    half = nn.Linear(6, 4).bfloat16()
    module = nn.ModuleList(
        [nn.Linear(6, 4), VocabularyHead(6, 9), VocabularyHead(6, 9, tied=True), nn.Embedding(9, 6), half]
    )
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    transpose_weights_for_decoding(module)
    transpose_weights_for_decoding(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    strides = {name: tensor.stride() for name, tensor in module.state_dict().items() if name.endswith("weight")}
    by_input, by_output = (1, 4), (6, 1)
    assert strides == {
        "0.weight": by_input,
        "1.weight": (1, 9),
        "2.weight": by_output,
        "3.weight": by_output,
        "4.weight": by_output,
    }


def test_a_model_draws_the_same_ids():
    sizes = {"num_text_tokens": 20, "text_seq_len": 6, "num_image_tokens": 12, "image_grid": (4, 4)}
    torch.manual_seed(0)
    model = DALLE(DALLEConfig(dim=32, depth=2, heads=2, dim_head=16, **sizes)).eval()
    text = torch.randint(1, 20, (3, 6))
    mask = torch.ones_like(text, dtype=torch.bool)
    drawn = []
    for _ in range(2):
        drawn.append(model.generate_codes(text, mask, options=DALLESampling(cond_scale=2.0), seeds=[0, 1, 2]))
        transpose_weights_for_decoding(model)
    assert torch.equal(*drawn)
