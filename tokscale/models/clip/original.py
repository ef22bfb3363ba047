"""CLIP weights of dalle-pytorch 1.6.6."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from einops import rearrange

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Shaped, Tensor
from tokscale.models.clip.config import CLIPConfig
from tokscale.models.original import State, refuse_others, stack_from_original, take

ORIGINAL_DEFAULTS = {
    "num_text_tokens": 10000,
    "visual_image_size": 256,
    "temperature_init": 1.0,
    "temperature_max": None,
}
"""What the original takes for options that are left out, where ours differ or have none."""
DIM_HEAD = 64
"""Of every attention head in the original's CLIP."""
KEPT = (
    "text_emb.weight",
    "text_pos_emb.weight",
    "to_text_latent.weight",
    "to_visual_embedding.weight",
    "to_visual_embedding.bias",
    "visual_pos_emb.weight",
    "to_visual_latent.weight",
)


def config_from_original(hparams: Mapping[str, Any]) -> CLIPConfig:
    """Options from the arguments of the original's constructor.

    Raises:
        ConfigError: Naming every option that cannot be carried over.
    """
    # The original takes the size of an image codebook, and never reads it.
    values = {key: value for key, value in hparams.items() if key != "num_visual_tokens"}
    return decode(CLIPConfig, ORIGINAL_DEFAULTS | values, where="hparams")


def state_dict_from_original(state: Mapping[str, Shaped[Tensor, "..."]], config: CLIPConfig) -> State:
    """Weights of a `CLIP` from those of the original.

    Raises:
        ConfigError: For an entry that is missing, or has no place here.
    """
    refuse_others(state, (*KEPT, "temperature"), ("text_transformer.", "visual_transformer."))
    found = {name: take(state, name) for name in KEPT}
    found["logit_scale.temperature"] = rearrange(take(state, "temperature"), "-> 1")
    for name, stack in (("text_transformer.", config.text_stack), ("visual_transformer.", config.visual_stack)):
        found |= stack_from_original(state, stack, source=name, target=name)
    return found


def hparams_from_state(state: Mapping[str, Shaped[Tensor, "..."]], channels: int = 3) -> dict[str, Any]:
    """The constructor's arguments as far as the weights' shapes tell them.

    The original never stores them: its CLIP is saved as a bare state dict.

    Args:
        state: Its entries.
        channels: Of its images, which no shape tells apart from the size of its patches.

    Raises:
        ConfigError: When no square patch of so many channels has the size of the weights.
    """
    words, dim_text = take(state, "text_emb.weight").shape
    patches, dim_image = take(state, "visual_pos_emb.weight").shape
    values = take(state, "to_visual_embedding.weight").shape[1]
    patch = isqrt(values // max(channels, 1))
    if channels < 1 or channels * patch**2 != values:
        raise ConfigError(
            f"hparams.channels: a patch of {values} values is no square of {channels} channels; say how many the "
            "images had, e.g. hparams.channels=1 for grey ones"
        )
    return {
        "dim_text": dim_text,
        "dim_image": dim_image,
        "dim_latent": take(state, "to_text_latent.weight").shape[0],
        "num_text_tokens": words,
        "text_seq_len": take(state, "text_pos_emb.weight").shape[0],
        "channels": channels,
        "visual_patch_size": patch,
        "visual_image_size": isqrt(patches) * patch,
        **_stack_sizes(state, "text_transformer.", "text"),
        **_stack_sizes(state, "visual_transformer.", "visual"),
    }


def _stack_sizes(state: Mapping[str, Shaped[Tensor, "..."]], prefix: str, name: str) -> dict[str, int]:
    queries = [value for key, value in state.items() if key.startswith(prefix) and key.endswith("to_qkv.weight")]
    if not queries:
        raise ConfigError(f"the checkpoint has no attention under {prefix}; it is not a CLIP of dalle-pytorch")
    return {f"{name}_enc_depth": len(queries), f"{name}_heads": queries[0].shape[0] // (3 * DIM_HEAD)}


def with_padding_id(state: Mapping[str, Shaped[Tensor, "..."]], config: CLIPConfig) -> tuple[State, CLIPConfig]:
    """Weights and options for a text tokenizer whose ids are all one higher, since its id 0 is padding alone."""
    rows = state["text_emb.weight"]
    moved = {**state, "text_emb.weight": torch.cat([rows[:1], rows])}
    return moved, config.model_copy(update={"num_text_tokens": config.sizes[0] + 1})
