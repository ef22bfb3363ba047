"""CLIP weights of dalle-pytorch 1.6.6."""

from collections.abc import Mapping
from typing import Any

from einops import rearrange

from tokscale.base.config import decode
from tokscale.base.shapes import Shaped, Tensor
from tokscale.models.clip.config import CLIPConfig
from tokscale.models.original import State, stack_from_original, take

SEED_DEFAULTS = {"num_text_tokens": 10000, "visual_image_size": 256, "temperature_init": 1.0, "temperature_max": None}
"""What the original takes for options that are left out, where ours differ or have none."""
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
    # The original takes the size of a picture codebook, and never reads it.
    values = {key: value for key, value in hparams.items() if key != "num_visual_tokens"}
    return decode(CLIPConfig, SEED_DEFAULTS | values, where="hparams")


def state_dict_from_original(state: Mapping[str, Shaped[Tensor, "..."]], config: CLIPConfig) -> State:
    """Weights of a `CLIP` from those of the original.

    Raises:
        ConfigError: For an entry that is missing, or has no place here.
    """
    found = {name: take(state, name) for name in KEPT}
    found["logit_scale.temperature"] = rearrange(take(state, "temperature"), "-> 1")
    for name, stack in (("text_transformer.", config.text_stack), ("visual_transformer.", config.visual_stack)):
        found |= stack_from_original(state, stack, source=name, target=name)
    return found
