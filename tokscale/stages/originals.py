"""What checkpoints of the original implementations hold, by source: options and weights in our words.

A further source is one function here: it gets the stage's configuration and what the file holds, and asks its model's
`original.py` for the options (`config_from_original`) and the weights (`state_dict_from_original`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokscale.base.config import Config
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.protocols import ImageTokenizer
from tokscale.base.shapes import Shaped, Tensor
from tokscale.models.clip import original as clip
from tokscale.models.dalle import original as dalle
from tokscale.models.maskgit import original as maskgit
from tokscale.models.parti import original as parti
from tokscale.models.rqtransformer import original as rqtransformer
from tokscale.tokenizers.codec import FrozenImageTokenizer, ImageCodec
from tokscale.tokenizers.dvae import original as dvae
from tokscale.tokenizers.dvae.model import DiscreteVAE
from tokscale.tokenizers.pretrained.checkpoint_files import named_tensors
from tokscale.tokenizers.vqgan import original as vqgan
from tokscale.tokenizers.vqgan.model import VQGAN

State = Mapping[str, Shaped[Tensor, "..."]]
_VAE = "vae."


@dataclass(frozen=True)
class Asked:
    """What the user says beside the checkpoint."""

    path: Path
    """Of the checkpoint, for messages."""
    hparams: Mapping[str, Any]
    """Arguments of the original's constructor that the checkpoint does not hold, or holds otherwise."""
    image: ImageTokenizer | None
    """The model's image tokenizer, where it is not in the checkpoint."""


@dataclass(frozen=True)
class FoundModel:
    """A model out of a checkpoint."""

    config: Config
    state: State
    codec: ImageCodec | None = None
    """Its image tokenizer, when the checkpoint has that too."""
    with_padding_id: Callable[[State, Any], tuple[State, Config]] | None = None
    """How its text vocabulary moves up by one, for a text tokenizer that reserves id 0 where the original did not."""


Found = FoundModel | ImageCodec
Reader = Callable[[Asked, Any], Found]


def read_dalle_pytorch(asked: Asked, values: Any) -> Found:
    """A DALL-E (`dalle.pt`), a discrete VAE (`vae.pt`), or the bare state dict of a CLIP.

    Raises:
        CheckpointError: When it is none of these.
        ConfigError: Naming an option that cannot be carried over.
    """
    tensors = named_tensors(values.get("weights", values)) if isinstance(values, Mapping) else {}
    if "to_logits.1.weight" in tensors:
        return _dalle(asked, values, tensors)
    if "to_visual_latent.weight" in tensors:
        given = _given(asked, values)
        config = clip.config_from_original(clip.hparams_from_state(tensors, _channels(given)) | given)
        return FoundModel(config, clip.state_dict_from_original(tensors, config), None, clip.with_padding_id)
    if "codebook.weight" in tensors:
        return _dvae(_given(asked, values), tensors, asked.path)
    raise CheckpointError(
        f"{asked.path}: neither a DALLE, a DiscreteVAE nor a CLIP of dalle-pytorch"
        + (
            "; DeepSpeed wrote its weights elsewhere: consolidate them there with zero_to_fp32.py first"
            if isinstance(values, Mapping) and isinstance(values.get("weights"), str)
            else ""
        )
    )


def read_muse_maskgit(asked: Asked, values: Any) -> Found:
    """A `MaskGit` with its critic and its image tokenizer, its `Transformer` alone, or a `VQGanVAE` alone.

    The tokenizer is taken from the checkpoint unless another is given; what its weights do not tell stands below
    `vae`: `hparams={vae: {resnet_groups: 8}}`. State dicts that were saved apart make one checkpoint as
    `{"transformer": ..., "token_critic": ...}`.

    Raises:
        CheckpointError: When it is neither.
        ConfigError: When the image tokenizer is not given, an option cannot be carried over or an entry has no place.
    """
    tensors = named_tensors(values) if isinstance(values, Mapping) else {}
    if vqgan.MARK in tensors:
        return _vqgan(tensors, asked.hparams, asked.path)
    if "token_emb.weight" in tensors:
        tensors = {f"{maskgit.GENERATOR}{name}": tensor for name, tensor in tensors.items()}
    if len(tensors.get(f"{maskgit.GENERATOR}to_logits.weight", ())) < 2:
        raise CheckpointError(
            f"{asked.path}: neither a MaskGit nor a Transformer of muse-maskgit-pytorch. A TokenCritic comes with the "
            'generator that it judges: save both as {"transformer": ..., "token_critic": ...}'
        )
    hparams = dict(asked.hparams)
    vae = hparams.pop("vae", {})
    inside = {name.removeprefix(_VAE): tensor for name, tensor in tensors.items() if name.startswith(_VAE)}
    codec, image = None, asked.image
    if image is None and vqgan.MARK in inside:
        if not isinstance(vae, Mapping):
            raise ConfigError(f"hparams.vae: got {vae!r}; give arguments of its VQGanVAE, e.g. {{resnet_groups: 16}}")
        codec = _vqgan(inside, {"image_size": _image_side(tensors, inside), **vae}, asked.path)
        image = FrozenImageTokenizer(codec)
    image = image or _image(asked, "the checkpoint holds no VQGanVAE: its image tokenizer")
    rows, cols, *_ = image.code_shape
    config = maskgit.config_from_original(tensors, image_grid=(rows, cols), **hparams).fitted(image, None)
    return FoundModel(config, maskgit.state_dict_from_original(tensors, config), codec)


def read_parti(asked: Asked, values: Any) -> Found:
    """A `Parti` of parti-pytorch; its image tokenizer, under `vae.`, is left out.

    Raises:
        CheckpointError: When it is none.
        ConfigError: When the image tokenizer is not given, an option cannot be carried over or an entry has no place.
    """
    tensors = named_tensors(values) if isinstance(values, Mapping) else {}
    if "axial_height_pos" not in tensors or "start_token" not in tensors:
        raise CheckpointError(f"{asked.path}: no Parti of parti-pytorch; give what torch.save made of its state dict")
    image = _image(asked, "Parti's own VitVQGanVAE")
    config = parti.config_from_original(
        parti.hparams_from_state(tensors) | dict(asked.hparams), image_grid=(image.code_shape[0], image.code_shape[1])
    ).fitted(image, None)
    return FoundModel(config, parti.state_dict_from_original(tensors, config))


def read_rqtransformer(asked: Asked, values: Any) -> Found:
    """An `RQTransformer` of RQ-transformer, which is told nothing beside its codes.

    Raises:
        CheckpointError: When it is none.
        ConfigError: When the image tokenizer is not given, an option cannot be carried over or an entry has no place.
    """
    tensors = named_tensors(values) if isinstance(values, Mapping) else {}
    if "spatial_start_token" not in tensors or "depth_pos_emb.weight" not in tensors:
        raise CheckpointError(
            f"{asked.path}: no RQTransformer of RQ-transformer; its HierarchicalCausalTransformer has other blocks and "
            "cannot be carried over"
        )
    image = _image(asked, "an RQ-VAE")
    hparams = dict(asked.hparams)
    found = rqtransformer.hparams_from_state(tensors, hparams.get("dim_head", 64)) | hparams
    config = rqtransformer.config_from_original(found, image_grid=(image.code_shape[0], image.code_shape[1])).fitted(
        image, None
    )
    return FoundModel(config, rqtransformer.state_dict_from_original(tensors, config))


SOURCES: Mapping[str, Reader] = {
    "dalle_pytorch": read_dalle_pytorch,
    "muse_maskgit": read_muse_maskgit,
    "parti_pytorch": read_parti,
    "rq_transformer": read_rqtransformer,
}
"""By the value of `source`."""


def _image(asked: Asked, left_out: str) -> ImageTokenizer:
    if asked.image is None:
        raise ConfigError(
            f"image_tokenizer: {left_out} is not carried over; give the folder of the image tokenizer whose codes the "
            "model draws"
        )
    return asked.image


def _dalle(asked: Asked, values: Mapping[str, Any], tensors: State) -> FoundModel:
    inside = {name.removeprefix(_VAE): tensor for name, tensor in tensors.items() if name.startswith(_VAE)}
    codec, image = None, asked.image
    if image is None:
        if not values.get("vae_params"):
            raise ConfigError(
                f"{asked.path}: its image tokenizer is a {values.get('vae_class_name', 'network')} that the "
                "checkpoint does not describe; import that first (source=image_tokenizer), then give "
                "image_tokenizer=FOLDER"
            )
        codec = _dvae(values["vae_params"], inside, asked.path)
        image = FrozenImageTokenizer(codec)
    config = dalle.config_from_original(
        _given(asked, values), num_image_tokens=image.num_tokens, image_grid=(image.code_shape[0], image.code_shape[1])
    )
    config = dalle.with_rotary_table(tensors, config)
    return FoundModel(config, dalle.state_dict_from_original(tensors, config), codec, dalle.with_padding_id)


def _vqgan(tensors: State, hparams: Mapping[str, Any], path: Path) -> ImageCodec:
    config = vqgan.config_from_original(tensors, hparams)
    return VQGAN.with_weights(config, vqgan.state_dict_from_original(tensors, config), path)


def _image_side(tensors: State, vae: State) -> int:
    """Pixels of the square whose codes a MaskGit has places for."""
    places = len(tensors[f"{maskgit.GENERATOR}pos_emb.weight"])
    layers = sum(
        name.startswith("enc_dec.encoders.") and name.endswith(".0.weight") and ".net." not in name for name in vae
    )
    return math.isqrt(places) << layers - 1  # the first of these convolutions halves nothing


def _dvae(hparams: Mapping[str, Any], tensors: State, path: Path) -> ImageCodec:
    config = dvae.config_from_original(hparams)
    return DiscreteVAE.with_weights(config, dvae.state_dict_from_original(tensors, config), path)


def _given(asked: Asked, values: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments, as stored and as the user corrects them."""
    stored = values.get("hparams") or {}
    return {**stored, **asked.hparams}


def _channels(hparams: Mapping[str, Any]) -> int:
    channels = hparams.get("channels", 3)
    if not isinstance(channels, int):
        raise ConfigError(f"hparams.channels: {channels!r} is no number of channels")
    return channels
