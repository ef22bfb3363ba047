"""parti-pytorch's sides of `bench parti`; runs in the interpreter that `./launch/originals` builds."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from parti_pytorch import parti_pytorch as original
from parti_pytorch import t5


class _Vae(torch.nn.Module):
    """As much of a tokenizer as the original's constructor asks of one."""

    def __init__(self, codes: int, grid: int):
        super().__init__()
        self.codebook_size, self.image_size = codes, grid
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_encoded_fmap_size(self, size: int) -> int:
        return size


def step(grid: int, batch: int, **sizes: int) -> Callable[[], object]:
    """Forward and backward of a whole training step."""
    model, told, ids = _made(grid, batch, **sizes)

    def call() -> float:
        model.zero_grad()
        loss = model(**told, image_token_ids=ids, return_loss=True)
        loss.backward()
        return loss.item()

    return call


def draw_at(at: int, grid: int, batch: int, **sizes: int) -> Callable[[], object]:
    """One round of the original's sampling loop: two whole passes over what was drawn so far, and the draw."""
    model, told, ids = _made(grid, batch, **sizes)
    model.eval()

    @torch.no_grad()
    def call() -> object:
        logits = model.forward_with_cond_scale(**told, image_token_ids=ids[:, :at])[:, -1]
        return original.gumbel_sample(original.top_k(logits, thres=0.9), temperature=1.0, dim=-1)

    return call


def _made(grid: int, batch: int, *, dim: int, depth: int, heads: int, codes: int, words: int, width: int) -> Any:
    t5.T5_CONFIGS["none"] = {"config": SimpleNamespace(d_model=width)}  # else the hub is asked, width given or not
    sizes = {"dim": dim, "depth": depth, "heads": heads, "dim_head": 64, "max_text_len": words}
    model = original.Parti(vae=_Vae(codes, grid), t5_name="none", text_embed_dim=width, **sizes)
    random = torch.Generator().manual_seed(0)
    states = torch.randn(batch, words, width, generator=random)
    told = {"text_token_embeds": states, "text_mask": torch.ones(batch, words, dtype=torch.bool)}
    return model, told, torch.randint(0, codes, (batch, grid * grid), generator=random)
