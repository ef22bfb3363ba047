"""Parti checkpoints of parti-pytorch (0.2.0)."""

from collections.abc import Mapping
from typing import Any

import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Int, Shaped, Tensor
from tokscale.models.original import State, refuse_others, take
from tokscale.models.parti.config import PartiConfig

RENAMED = {"vae_codebook_size": "num_image_tokens"}
OURS = {"kv_tied": True, "rel_pos_index": "sequence", "rel_pos_bias": True, "multi_query": True}
"""What the original does whatever its options: one tensor of keys and values, biases one place off."""
UNREAD = ("vae", "vae_image_size", "t5_name", "ignore_index")
"""Options that say where codes, states and losses come from, which is not the model's business here."""
ATTENTION = {"norm.gamma": "norm.weight", "to_q.1.weight": "to_q.weight", "to_kv.1.weight": "to_kv.weight",
             "to_out.1.weight": "to_out.weight", "null_kv": "null_kv"}  # fmt: skip
_PLACES = "rel_pos_bias.pos_indices"
FEEDFORWARD = {"0.gamma": "norm.weight", "1.weight": "to_hidden.weight", "3.gamma": "inner_norm.weight",
               "4.weight": "to_out.weight"}  # fmt: skip


def config_from_original(
    hparams: Mapping[str, Any], *, image_grid: tuple[int, int], num_image_tokens: int | None = None
) -> PartiConfig:
    """Options from the arguments that the original was made with.

    Args:
        hparams: Of its constructor; `text_embed_dim` is needed.
        image_grid: Rows and columns of its image tokenizer's codes, which are equal there.
        num_image_tokens: Of its image tokenizer, where `vae_codebook_size` does not say it.

    Raises:
        ConfigError: Naming every option that cannot be carried over.
    """
    given = {RENAMED.get(key, key): value for key, value in hparams.items() if key not in UNREAD and value is not None}
    if "text_embed_dim" not in given:
        raise ConfigError("hparams.text_embed_dim: not given; it is the width of the T5 model that the original read")
    width = given.pop("text_embed_dim")
    sizes = {"image_grid": image_grid} | ({} if num_image_tokens is None else {"num_image_tokens": num_image_tokens})
    condition = {"kind": "embeddings", "width": width}
    return decode(PartiConfig, given | sizes | OURS | {"condition": condition}, where="hparams")


def hparams_from_state(state: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, Any]:
    """The constructor's arguments as far as the weights' shapes tell them; the original's checkpoints hold no others.

    Raises:
        ConfigError: When it is no checkpoint of a Parti.
    """
    dim, dim_head = len(take(state, "start_token")), len(take(state, "layers.0.0.null_kv"))
    return {
        "dim": dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("layers.")}),
        "dim_head": dim_head,
        "heads": len(take(state, "layers.0.0.to_q.1.weight")) // dim_head,
        "ff_mult": len(take(state, "layers.0.2.1.weight")) / dim,
        "text_embed_dim": take(state, "layers.0.1.to_kv.1.weight").shape[1],
    }


def state_dict_from_original(state: Mapping[str, Shaped[Tensor, "..."]], config: PartiConfig) -> State:
    """Weights of a `Parti` from those of the original; its image tokenizer, under `vae.`, is left out.

    Raises:
        ConfigError: For an entry that is missing.
    """
    found: State = {
        "positions.start": take(state, "start_token"),
        "positions.rows": take(state, "axial_height_pos"),
        "positions.cols": take(state, "axial_width_pos"),
        "init_norm.weight": take(state, "init_norm.gamma"),
        "decoder.norm.weight": take(state, "final_norm.gamma"),
        "head.weight": take(state, "image_token_embed.weight", "to_logits.weight"),
    }
    refuse_others(state, _known(config), ("vae.",))
    for name, tensor in state.items():
        if name.endswith(".beta") and tensor.any():
            raise ConfigError(f"{name}: an offset that is not zero, which the original never learns")
        if name.endswith(_PLACES) and not torch.equal(tensor, _places(config.sizes[1][0])):
            raise ConfigError(f"{name}: other places than the original's of {config.sizes[1][0]} rows and columns")
    for layer in range(config.depth):
        there, here = f"layers.{layer}", f"decoder.layers.{layer}"
        for number, name in enumerate(("self_attn", "cross_attn")):
            for theirs, ours in ATTENTION.items():
                found[f"{here}.{name}.{ours}"] = take(state, f"{there}.{number}.{theirs}")
        for theirs, ours in FEEDFORWARD.items():
            found[f"{here}.ff.{ours}"] = take(state, f"{there}.2.{theirs}")
        table = take(state, f"{there}.0.rel_pos_bias.pos_bias.weight")
        # The start token has no row of its own there, and none is read with rel_pos_index=sequence.
        found[f"{here}.self_attn.bias.table"] = torch.cat([table, torch.zeros_like(table[:1])])
    return found


def _known(config: PartiConfig) -> set[str]:
    """Names of all entries that the original's model of these options has."""
    norms = ["init_norm.", "final_norm."]
    known = {"start_token", "axial_height_pos", "axial_width_pos", "image_token_embed.weight", "to_logits.weight"}
    for layer in range(config.depth):
        there = f"layers.{layer}."
        known |= {f"{there}{number}.{name}" for number in (0, 1) for name in ATTENTION}
        known |= {f"{there}2.{name}" for name in FEEDFORWARD}
        known |= {f"{there}0.rel_pos_bias.pos_bias.weight", f"{there}0.{_PLACES}"}
        norms += [f"{there}{part}." for part in ("0.norm", "1.norm", "2.0", "2.3")]
    return known | {f"{norm}{part}" for norm in norms for part in ("gamma", "beta")}


def _places(side: int) -> Int[Tensor, "places places"]:
    """The original's buffer: which row of the table of biases each pair of places reads."""
    at = torch.arange(side * side)
    rows, columns = at // side, at % side
    down, right = (axis[:, None] - axis + side - 1 for axis in (rows, columns))
    return down * (2 * side - 1) + right
