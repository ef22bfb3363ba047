"""Weights of muse-maskgit-pytorch (0.3.5), whose checkpoints hold nothing but weights."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Shaped, Tensor
from tokscale.models.maskgit.config import BlocksConfig, MaskGitConfig
from tokscale.models.original import State, take

_LAYER = re.compile(r"transformer_blocks\.layers\.(\d+)\.([012])\.(.+)")
_PARTS = ("attn", "cross_attn", "ff")
_FEED_FORWARD = {"0.gamma": "norm.weight", "1.weight": "to_hidden.weight", "3.gamma": "hidden_norm.weight"} | {
    "4.weight": "to_out.weight"
}
_SAME = ("token_emb.weight", "pos_emb.weight", "to_logits.weight", "text_embed_proj.weight")
_SELF_CRITIC = "token_critic.net."
GENERATOR = "transformer."
"""Before the names of the generator's entries in the state dict of a `MaskGit`."""


def config_from_original(
    state: Mapping[str, Shaped[Tensor, "..."]], *, image_grid: tuple[int, int], **options: Any
) -> MaskGitConfig:
    """Options read off the shapes of a `MaskGit` checkpoint.

    Args:
        state: Its state dict.
        image_grid: Rows and columns of the codes.
        options: What no shape tells: `self_cond`, `noise_schedule`, `cond_drop_prob`, `lowres`, ...

    Raises:
        ConfigError: When a weight is missing, the grid is another or an option is unknown.
    """
    sizes, places = _sizes(state, GENERATOR), len(take(state, GENERATOR + "pos_emb.weight"))
    if places != image_grid[0] * image_grid[1]:
        raise ConfigError(
            f"the checkpoint draws {places} places, which are no grid of {image_grid[0]} x {image_grid[1]} codes; take "
            "the image tokenizer that it was trained with, at its image size"
        )
    projection = state.get(GENERATOR + "text_embed_proj.weight")
    found: dict[str, Any] = {
        "num_tokens": len(take(state, GENERATOR + "to_logits.weight")),
        "image_grid": image_grid,
        "condition": {"kind": "embeddings", "width": sizes["dim"] if projection is None else projection.shape[1]},
    }
    if "token_critic.to_pred.weight" in state:
        found["self_token_critic"] = True
    elif "token_critic.to_logits.weight" in state:
        found["token_critic"] = _sizes(state, "token_critic.")
    return decode(MaskGitConfig, sizes | found | options, where="options")


def state_dict_from_original(state: Mapping[str, Shaped[Tensor, "..."]], config: MaskGitConfig) -> State:
    """Weights of a `MaskGit` from those of the original; its image tokenizers are left out.

    Left out too are what it never uses: a norm beside the layers, the self-conditioning of a model without it, the
    second copy of a self critic's generator. Low-resolution codes have no positions there, so those are zero here.

    Raises:
        ConfigError: For an entry that is missing, or has no place here.
    """
    found: State = {}
    for name, tensor in state.items():
        if name.startswith(("vae.", "cond_vae.", _SELF_CRITIC)):
            continue
        owner, _, rest = name.partition(".")
        if name.startswith("token_critic.to_pred."):
            found[name] = tensor
            continue
        keeps = owner == "transformer" and config.self_cond
        renamed = _renamed(rest, keeps) if owner in ("transformer", "token_critic") else None
        if renamed is None:
            raise ConfigError(f"{name}: nothing here takes this entry; it is not of a MaskGit with {config!r}")
        if renamed.endswith(".beta"):
            if tensor.any():
                raise ConfigError(f"{name}: an offset that is not zero, which the original never learns")
        elif renamed:
            found[f"{owner}.{renamed}"] = rearrange(tensor, "two h 1 d -> two h d") if "null_kv" in name else tensor
    if config.lowres is not None:
        for owner in ("transformer", "token_critic") if config.token_critic is not None else ("transformer",):
            found |= _no_positions(f"{owner}.lowres.", config, take(found, f"{owner}.token_emb.weight").shape[1])
    return found


def _renamed(name: str, self_cond: bool) -> str | None:
    """Our name of an entry; empty when it has no use, None when it is unknown."""
    if name in _SAME:
        return name
    if name in ("norm.gamma", "norm.beta"):
        return ""
    if name in ("transformer_blocks.norm.gamma", "transformer_blocks.norm.beta"):
        return name.replace("gamma", "weight")
    if name.startswith("self_cond_to_init_embed."):
        part = _feed_forward(name.removeprefix("self_cond_to_init_embed."))
        return part and (f"self_cond_to_init_embed.{part}" if self_cond else "")
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    part = _feed_forward(match[3]) if match[2] == "2" else match[3].replace("norm.gamma", "norm.weight")
    return part and f"transformer_blocks.layers.{match[1]}.{_PARTS[int(match[2])]}.{part}"


def _feed_forward(name: str) -> str | None:
    return name if name.endswith(".beta") else _FEED_FORWARD.get(name)


def _no_positions(prefix: str, config: MaskGitConfig, dim: int) -> State:
    assert config.lowres is not None and config.lowres.image_grid is not None
    if not config.lowres.shared_emb or config.lowres.layout != "cross":
        raise ConfigError("lowres: the original has layout=cross and shared_emb=true; set both")
    height, width = config.lowres.image_grid
    sizes = {"rows.weight": (height, dim), "cols.weight": (width, dim), "scale": (dim,)}
    return {prefix + name: torch.zeros(size) for name, size in sizes.items()}


def _sizes(state: Mapping[str, Shaped[Tensor, "..."]], prefix: str) -> dict[str, Any]:
    """Sizes of a transformer from the shapes of its weights."""
    layers = prefix + "transformer_blocks.layers."
    query, dim_head = take(state, layers + "0.0.to_q.weight"), len(take(state, layers + "0.0.q_scale"))
    hidden, dim = take(state, layers + "0.2.3.gamma").shape[0], query.shape[1]
    sizes = {
        "dim": dim,
        "depth": len({name.removeprefix(layers).partition(".")[0] for name in state if name.startswith(layers)}),
        "heads": len(query) // dim_head,
        "dim_head": dim_head,
        # The least multiple that gives this width back after rounding down.
        "ff_mult": next(mult for mult in _multiples(hidden, dim) if int(dim * mult * 2 / 3) == hidden),
    }
    return BlocksConfig(**sizes).model_dump(include=set(sizes))


def _multiples(hidden: int, dim: int) -> list[float]:
    exact = hidden * 1.5 / dim
    return [float(round(exact)), exact, (hidden + 0.5) * 1.5 / dim]
