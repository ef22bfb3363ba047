"""Weights of the original RQ-Transformer (RQ-transformer 0.1.8 and 0.1.9 have the same)."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Shaped, Tensor
from tokscale.models.original import State, take
from tokscale.models.rqtransformer.config import RQTransformerConfig

_STAGES = {"spatial_transformer": 0, "depth_transformer": 1}
_LAYER = re.compile(r"(spatial_transformer|depth_transformer)\.layers\.(\d+)\.([01])\.(.+)")
_OURS = {
    ("0", "norm.weight"): "layers.{}.attn.norm.weight",
    ("0", "norm.bias"): "layers.{}.attn.norm.bias",
    ("0", "to_qkv.weight"): "attentions.{}.to_qkv.weight",
    ("0", "to_out.weight"): "attentions.{}.to_out.weight",
    ("1", "0.weight"): "layers.{}.ff.norm.weight",
    ("1", "0.bias"): "layers.{}.ff.norm.bias",
    ("1", "1.weight"): "feedforwards.{}.to_hidden.weight",
    ("1", "1.bias"): "feedforwards.{}.to_hidden.bias",
    ("1", "4.weight"): "feedforwards.{}.to_out.weight",
    ("1", "4.bias"): "feedforwards.{}.to_out.bias",
}
_AROUND = {
    "token_emb.weight": "code_emb.weight",
    "spatial_start_token": "opening.start",
    "depth_pos_emb.weight": "stages.1.positions.weight",
    "to_logits.weight": "head.weight",
    "to_logits.bias": "head.bias",
}


def config_from_original(
    options: Mapping[str, Any], *, image_grid: tuple[int, int] | None = None
) -> RQTransformerConfig:
    """Options from the original's constructor arguments, which its checkpoints do not hold.

    `pad_id` is left out: there it is 0, which is also a code (D02).

    Raises:
        ConfigError: Naming every option that cannot be carried over.
    """
    values = {name: value for name, value in options.items() if name != "pad_id"}
    return decode(RQTransformerConfig, {"kind": "rqtransformer", "image_grid": image_grid} | values, where="options")


def hparams_from_state(state: Mapping[str, Shaped[Tensor, "..."]], dim_head: int = 64) -> dict[str, Any]:
    """The constructor's arguments as far as the weights' shapes tell them.

    Args:
        state: Its entries.
        dim_head: Width of a head, which no shape tells; the original's default.

    Raises:
        ConfigError: When it is no checkpoint of an RQ-Transformer.
    """
    words, dim = take(state, "token_emb.weight").shape
    queries = len(take(state, "spatial_transformer.layers.0.0.to_qkv.weight")) // 3
    if dim_head < 1 or queries % dim_head:
        raise ConfigError(
            f"hparams.dim_head: attention of {queries} channels has no heads of {dim_head}; give the dim_head that the "
            "original was made with"
        )
    layers = {stage: {name.split(".")[2] for name in state if name.startswith(f"{stage}.layers.")} for stage in _STAGES}
    return {
        "num_tokens": words,
        "dim": dim,
        "dim_head": dim_head,
        "heads": queries // dim_head,
        "spatial_layers": len(layers["spatial_transformer"]),
        "depth_layers": len(layers["depth_transformer"]),
        "max_spatial_seq_len": len(take(state, "spatial_pos_emb.weight")) - 1,
        "depth_seq_len": len(take(state, "depth_pos_emb.weight")),
        "ff_mult": len(take(state, "spatial_transformer.layers.0.1.1.weight")) / dim,
    }


def state_dict_from_original(state: Mapping[str, Shaped[Tensor, "..."]], config: RQTransformerConfig) -> State:
    """Weights of an `RQTransformer` from those of the original.

    The original's attention has no bias after its output projection: ours becomes zero. Its table of places has a row
    more, for a place after the last one.

    Raises:
        ConfigError: For an entry that is missing, or has no place here.
    """
    plain = not (config.ff_glu or config.layer_scale or config.rotary_emb or config.shift_tokens or config.condition)
    if not plain or config.shared_attn_ids is not None or config.shared_ff_ids is not None:
        raise ConfigError(
            "the original has plain blocks with learned positions and nothing else; leave options at that"
        )
    found = {ours: take(state, theirs) for theirs, ours in _AROUND.items()}
    found["stages.0.positions.weight"] = take(state, "spatial_pos_emb.weight")[: config.lengths[0]]
    for name, stage in _STAGES.items():
        for part in ("weight", "bias"):
            found[f"stages.{stage}.norm.{part}"] = take(state, f"{name}.norm.{part}")
        for layer in range(config.layers[stage]):
            bias = torch.zeros_like(found["opening.start"])
            found[f"stages.{stage}.stack.attentions.{layer}.to_out.bias"] = bias
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if match and (match[3], match[4]) in _OURS and int(match[2]) < config.layers[_STAGES[match[1]]]:
            place = _OURS[match[3], match[4]].format(match[2])
            found[f"stages.{_STAGES[match[1]]}.stack.{place}"] = tensor
        elif name not in _AROUND and not re.fullmatch(r"spatial_pos_emb\.weight|\w+_transformer\.norm\.\w+", name):
            raise ConfigError(f"{name}: nothing here takes this entry; the checkpoint's options differ from {config!r}")
    return found
