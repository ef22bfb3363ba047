"""The original's attention layers for `bench attention`; runs in the interpreter that `./launch/originals` builds."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from dalle_pytorch import attention
from dalle_pytorch.transformer import CachedAs, NonCached, Transformer
from torch import nn

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Attention", {}),
    "axial_row": ("SparseAxialCausalAttention", {"axis": 0}),
    "axial_col": ("SparseAxialCausalAttention", {"axis": 1}),
    "conv_like": ("SparseConvCausalAttention", {}),
}


def formulation(kind: str, batch: int, text: int, grid: int, heads: int, dim_head: int) -> Callable[[], object]:
    """Forward and backward from queries, keys and values: the layer with its projections taken out."""
    width, length = heads * dim_head, text + grid * grid
    layer = original_layer(kind, dim=width, seq_len=length, heads=heads, dim_head=dim_head, image_size=grid)
    layer.to_qkv, layer.to_out = nn.Identity(), nn.Identity()
    tokens = torch.randn(batch, length, 3 * width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(layer(tokens), tokens, weight)


def decoding(
    kind: str, batch: int, text: int, grid: int, heads: int, dim_head: int, depth: int, place: int, cached: bool
) -> Callable[[], object]:
    """What the next token costs after `place` positions: a pass over all of them, or a step on the original's cache.

    Layers other than `full` share one history in the original, which then grows by `depth` tokens a step; here each has
    its own. The cache is filled with noise: what it holds does not matter for time.
    """
    dim = heads * dim_head
    stack = Transformer(
        dim=dim,
        depth=depth,
        seq_len=text + grid * grid,
        heads=heads,
        dim_head=dim_head,
        attn_types=(kind,),
        image_fmap_size=grid,
    ).eval()
    if not cached:
        tokens = torch.randn(batch, place, dim)
        return torch.no_grad()(lambda: stack(tokens))
    filled: dict[str, Any] = {"offset": place}
    for layer, (own, _) in enumerate(stack.layers.layers):
        key = f"attn_{layer}"
        if isinstance(own.fn.fn, NonCached):
            own.fn.fn = CachedAs(key, own.fn.fn)
            filled[key] = torch.randn(batch, place, dim)
        else:
            filled[key] = tuple(torch.randn(batch, heads, place, dim_head) for _ in range(2))
    token = torch.randn(batch, 1, dim)
    return torch.no_grad()(lambda: stack(token, cache=dict(filled)))


def original_layer(kind: str, image_size: int, **options: Any) -> nn.Module:
    """A layer of the original. Queries are scaled out of place, since scaling them in place cannot always be
    differentiated (D12); that changes no value."""
    name, fixed = KINDS[kind]
    if kind != "full":
        fixed = fixed | {"image_size": image_size}
    names = dict(vars(attention))
    exec(inspect.getsource(getattr(attention, name)).replace("q *= self.scale", "q = q * self.scale"), names)
    return names[name](**options, **fixed)
