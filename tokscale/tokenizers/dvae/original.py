"""Coming from DALLE-pytorch: its `DiscreteVAE` hyper-parameters and weights in our words."""

from collections.abc import Mapping
from typing import Any

from tokscale.base.config import decode
from tokscale.base.shapes import Tensor
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig


def config_from_original(hparams: Mapping[str, Any]) -> DiscreteVAEConfig:
    """Our configuration for the original's constructor arguments (`hparams` of a `vae.pt`).

    Raises:
        ConfigError: Naming an argument that has no counterpart.
    """
    values = dict(hparams)
    if not values.get("straight_through", False):
        values.pop("reinmax", None)  # silently without effect there, refused here
    return decode(DiscreteVAEConfig, {"kind": "dvae"} | values, where="vae_params")


def state_dict_from_original(state: Mapping[str, Tensor], config: DiscreteVAEConfig) -> dict[str, Tensor]:
    """Our names for the original's tensors: its last encoder layer is our `to_logits`."""
    head = f"encoder.{config.num_layers + config.num_resnet_blocks}."
    return {name.replace(head, "to_logits.", 1) if name.startswith(head) else name: state[name] for name in state}


def state_dict_to_original(state: Mapping[str, Tensor], config: DiscreteVAEConfig) -> dict[str, Tensor]:
    """The original's names for our tensors: what `state_dict_from_original` takes back."""
    head = f"encoder.{config.num_layers + config.num_resnet_blocks}."
    return {
        name.replace("to_logits.", head, 1) if name.startswith("to_logits.") else name: state[name] for name in state
    }
