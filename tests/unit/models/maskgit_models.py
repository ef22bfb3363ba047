"""Small MaskGIT models and batches for the tests."""

from typing import Any

import torch

from tokscale.base import rng
from tokscale.base.batch import LOWRES_CODES, TokenBatch
from tokscale.models.maskgit import MaskGit, MaskGitConfig
from tokscale.models.maskgit.network import ConditioningInputs

WORDS, TEXT, CODES, GRID = 11, 5, 13, (3, 4)
COUNT = GRID[0] * GRID[1]
CAPTION = {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}
SEPARATE = {"token_critic": {"dim": 24, "depth": 1, "heads": 2, "dim_head": 8}}
LOWRES = {"lowres": {"image_grid": (2, 2)}}


def make(**options: Any) -> MaskGit:
    sizes = {"num_tokens": CODES, "image_grid": GRID, "num_text_tokens": WORDS, "text_seq_len": TEXT}
    small = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "condition": CAPTION, "cond_drop_prob": 0.25}
    config = MaskGitConfig.model_validate(small | sizes | options)
    with rng.scope(0, "model"):
        return MaskGit(config)


def sharp(**options: Any) -> MaskGit:
    """A model whose distributions are far from uniform, so that a wrong logit changes what is drawn."""
    model = make(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "to_logits" in name or "to_pred" in name or ("attn.to_out" in name):
                parameter.mul_(3)
        model.transformer.token_emb.weight[CODES].mul_(0.1)  # places, not the mask, tell masked codes apart
    return model


def make_batch(size: int = 4, first: int = 0) -> TokenBatch:
    stream = rng.generator(0, "batch")
    text = torch.randint(1, WORDS, (size, TEXT), generator=stream)
    text[0, 2:] = 0
    codes = torch.randint(0, CODES, (size, *GRID), generator=stream)
    lowres = torch.randint(0, CODES, (size, 2, 2), generator=stream)
    return TokenBatch(
        positions=torch.arange(first, first + size),
        text=text,
        text_mask=text != 0,
        codes=codes,
        extra={LOWRES_CODES: lowres},
    )


def inputs(model: MaskGit, batch: TokenBatch) -> ConditioningInputs:
    return model.reader(batch.text, batch.text_mask, batch.extra)


def logits(model: MaskGit, batch: TokenBatch, ids: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """Logits at every place, with the text or without it."""
    context = model.transformer.context(inputs(model, batch))
    seen = model.transformer.text_hidden(context, torch.full((len(ids),), keep))
    return model.transformer.to_logits(model.transformer(ids, seen))
