"""Entropy of every attention of MaskGIT and Parti, against sums over single keys."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from maskgit_models import make as maskgit_model
from maskgit_models import make_batch as maskgit_batch
from test_parti_model import PAPER
from test_parti_model import make as parti_model
from test_parti_model import make_batch as parti_batch
from torch import Tensor, nn

from tokscale.base.batch import TokenBatch
from tokscale.models.common import evaluating
from tokscale.models.maskgit import layers as maskgit
from tokscale.models.parti import attention as parti
from tokscale.nn.attention.module import Attention
from tokscale.nn.attention.observed import looking, observed
from tokscale.train.diagnostics import spread

Case = tuple[nn.Module, TokenBatch, set[str]]


def cases() -> Iterator[tuple[str, Case]]:
    own = {f"transformer.transformer_blocks.layers.{n}.{which}" for n in range(2) for which in ("attn", "cross_attn")}
    words = "reader.conditioning.encoder.stack.attentions.0"
    critic = {f"token_critic.transformer_blocks.layers.0.{which}" for which in ("attn", "cross_attn")}
    separate = {"token_critic": {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8}}
    yield "critic", (maskgit_model(**separate), maskgit_batch(), own | critic | {words})
    lowres = {"lowres": {"image_grid": (2, 2), "layout": "encoder", "depth": 1}, "self_cond": True, "flash": False}
    yield (
        "lowres",
        (maskgit_model(**lowres), maskgit_batch(), own | {words, "transformer.lowres.encoder.layers.0.attn"}),
    )
    decoder = {f"decoder.layers.{number}.{which}" for number in range(2) for which in ("self_attn", "cross_attn")}
    yield "original", (parti_model(), parti_batch(), decoder)
    paper = parti_model(**PAPER)
    yield "paper", (paper, parti_batch(), decoder | {"condition.encoder.stack.attentions.0"})


CASES = dict(cases())


def entropy(scores: Tensor, visible: Tensor) -> float:
    """Of one query's scores over the keys that it sees, term by term."""
    seen = [score for score, is_seen in zip(scores.tolist(), visible.tolist(), strict=True) if is_seen]
    masses = [math.exp(score - max(seen)) for score in seen]
    return -sum(mass / sum(masses) * math.log(mass / sum(masses)) for mass in masses if mass)


def heads(x: Tensor, dim_head: int) -> Tensor:
    return x.unflatten(-1, (-1, dim_head)).transpose(1, 2)


def of_maskgit(module: maskgit.Attention, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    x, size = module.norm(x), module.config.dim_head
    source, mask = (x, None) if context is None else context
    q, (k, _) = heads(module.to_q(x[: len(source)]), size), module.to_kv(source).chunk(2, dim=-1)
    k = torch.cat([module.null_kv[0][None, :, None].expand(len(source), -1, -1, -1), heads(k, size)], dim=2)
    q, k = q / q.norm(dim=-1, keepdim=True) * module.q_scale, k / k.norm(dim=-1, keepdim=True) * module.k_scale
    scores = module.config.scale * q @ k.mT
    visible = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        visible[..., 1:] &= mask[:, None, None]
    return scores, visible


def of_parti(module: parti.Projections, x: Tensor, *told: Any) -> tuple[Tensor, Tensor]:
    x, size = module.norm(x), module.dim_head
    source = told[0] if isinstance(module, parti.CrossAttention) else x
    q, made = heads(module.to_q(x), size), module.to_kv(source)
    if module.null_kv is not None:
        made = torch.cat([module.null_kv.expand(len(made), 1, -1), made], dim=1)
    k = heads(made[..., : made.shape[-1] // module.tensors], size).expand(-1, q.shape[1], -1, -1)
    scores = q @ k.mT / math.sqrt(size)
    visible = torch.ones_like(scores, dtype=torch.bool)
    length = x.shape[1]
    if isinstance(module, parti.CrossAttention):
        visible[..., 1:] &= told[1][:, None, None]
    elif isinstance(module, parti.RelativeSelfAttention):
        rows = module.bias.places.offsets()[:length, :length]
        scores[..., 1:] += module.bias.table[rows].permute(2, 0, 1)
        visible[..., 1:] = torch.ones(length, length, dtype=torch.bool).tril()
    else:
        visible &= module.pattern.dense(length, x.device)
    return scores, visible


@pytest.mark.parametrize("case", CASES)
def test_entropies_are_those_of_sums_over_single_keys(case):
    model, batch, names = CASES[case]
    attentions, found, slow = observed(model), dict[str, list[float]](), dict[str, list[float]]()

    def listen(name: str, module: nn.Module) -> None:
        def note(module: Any, given: tuple[Any, ...], how: dict[str, Any]) -> None:
            own = of_maskgit if isinstance(module, maskgit.Attention) else of_parti
            scores, visible = own(module, *given, **how)
            rows = zip(scores.flatten(0, -2), visible.flatten(0, -2), strict=True)
            each = [entropy(*row) for row in rows]
            slow.setdefault(name, []).append(sum(each) / len(each))

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))

    hooks: list[Any] = []
    for name, module in model.named_modules():
        if name in names and not isinstance(module, Attention):  # those of the stack: test_diagnostics
            listen(name, module)
    with evaluating(model):
        expected = model(batch).total
        for hook in hooks:
            hook.remove()
        with looking(attentions, lambda name, weights: found.setdefault(name, []).append(spread(weights))):
            assert torch.equal(model(batch).total, expected)
        assert torch.equal(model(batch).total, expected)
    assert found.keys() == names
    for name, values in slow.items():
        mean = sum(found[name]) / len(found[name])
        assert mean == pytest.approx(sum(values) / len(values), rel=1e-5), name
