"""RQ-transformer 0.1.9 for `bench rq`; runs in the interpreter that `./launch/originals` builds."""

from collections.abc import Callable
from typing import Any

import torch
from rq_transformer import RQTransformer
from rq_transformer.rq_transformer import gumbel_sample, top_k


def step(batch: int, num_tokens: int, **sizes: Any) -> Callable[[], object]:
    """Forward and backward of the loss."""
    model = _model(num_tokens, sizes)
    shape = (batch, sizes["max_spatial_seq_len"], sizes["depth_seq_len"])
    codes = torch.randint(1, num_tokens, shape, generator=torch.Generator().manual_seed(0))

    def run() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(codes, return_loss=True)
        loss.backward()
        return loss.item()

    return run


def next_code(known: int, batch: int, num_tokens: int, **sizes: Any) -> Callable[[], object]:
    """One turn of the loop in `generate`, after `known` codes."""
    model = _model(num_tokens, sizes)
    seq = torch.randint(1, num_tokens, (batch, known), generator=torch.Generator().manual_seed(0))
    return lambda: gumbel_sample(top_k(model.forward(seq)[:, -1], thres=0.9)).tolist()


def _model(num_tokens: int, sizes: dict[str, Any]) -> RQTransformer:
    torch.manual_seed(0)
    return RQTransformer(num_tokens=num_tokens, **sizes)
