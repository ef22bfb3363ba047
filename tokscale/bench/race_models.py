"""Who races in `bench race`: each family's model in the words of both sides, and our side's training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokscale.base import rng
from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.config import Config, decode
from tokscale.base.protocols import Engine, ImageTokenizer, TextTokenizer
from tokscale.base.shapes import Shaped, Tensor
from tokscale.bench.racing import STATES, Slices, batches, caption_states
from tokscale.bench.stepping import TOTAL_STEPS
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, EagerConfig, EngineDtype, ScheduleConfig
from tokscale.models.dalle import DALLESampling
from tokscale.models.dalle import original as dalle_original
from tokscale.models.maskgit import MaskGitSampling
from tokscale.models.maskgit import original as maskgit_original
from tokscale.models.parti import PartiSampling
from tokscale.models.parti import original as parti_original
from tokscale.models.registry import ModelConfig, build_model
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.image import load_image_tokenizer

State = Mapping[str, Shaped[Tensor, "..."]]
_CONDITION = {"kind": "embeddings", "width": STATES}


@dataclass(frozen=True)
class Sizes:
    """What both sides are built to."""

    dim: int
    depth: int
    heads: int
    dim_head: int
    text_seq_len: int

    @property
    def shared(self) -> dict[str, int]:
        """Those that every family has by these names."""
        return {name: getattr(self, name) for name in ("dim", "depth", "heads", "dim_head")}


@dataclass(frozen=True)
class Family:
    """A model and its original."""

    program: str
    """The original's side, a function in `tests/originals/`."""
    ours: Callable[[Sizes, ImageTokenizer, TextTokenizer], Config]
    """Our configuration; the same function as the original's."""
    theirs: Callable[[Sizes, Any, TextTokenizer], dict[str, Any]]
    """Arguments of the original's side."""
    weights: Callable[[State, Any], State]
    """Of our model from the original's."""
    sampling: Config
    """How both are made to draw; the recipe's own."""
    from_pixels: bool = False
    """Whether the original reads images and makes codes of them in each step; otherwise both are given the codes."""


def _dalle(sizes: Sizes, image: ImageTokenizer, text: TextTokenizer) -> Config:
    options = {"kind": "dalle", "attn_types": ["full"], "rotary_emb": False, "text_seq_len": sizes.text_seq_len}
    return _fitted(options | sizes.shared, image, text)


def _their_dalle(sizes: Sizes, image: Any, text: TextTokenizer) -> dict[str, Any]:
    own: DiscreteVAEConfig = image.config
    names = ("image_size", "num_tokens", "codebook_dim", "num_layers", "num_resnet_blocks", "hidden_dim", "channels")
    vae = {name: getattr(own, name) for name in names} | {"normalization": own.means_and_stds()}
    options = {"attn_types": ["full"], "rotary_emb": False, "text_seq_len": sizes.text_seq_len}
    return sizes.shared | options | {"num_text_tokens": text.num_tokens, "vae": vae}


def _maskgit(sizes: Sizes, image: ImageTokenizer, text: TextTokenizer) -> Config:
    # The original divides by the number of masked codes, and hides a tenth of the captions as told.
    options = {"kind": "maskgit", "condition": _CONDITION, "cond_drop_prob": 0.1, "loss_mean": "tokens"}
    return _fitted(options | sizes.shared | {"text_seq_len": sizes.text_seq_len}, image, text)


def _parti(sizes: Sizes, image: ImageTokenizer, text: TextTokenizer) -> Config:
    options = {"kind": "parti", "condition": _CONDITION, "max_text_len": sizes.text_seq_len, "cond_drop_prob": 0.25}
    return _fitted(options | parti_original.OURS | sizes.shared, image, text)


def _their_parti(sizes: Sizes, image: Any, text: TextTokenizer) -> dict[str, Any]:
    return _grid(sizes, image, text) | {"max_text_len": sizes.text_seq_len}


def _grid(sizes: Sizes, image: Any, text: TextTokenizer) -> dict[str, Any]:
    return sizes.shared | {"words": text.num_tokens, "side": image.code_shape[0], "num_tokens": image.num_tokens}


def _fitted(options: Mapping[str, Any], image: ImageTokenizer, text: TextTokenizer) -> Config:
    config: Any = decode(ModelConfig, options, where="model")
    return config.fitted(image, text)


FAMILIES: dict[str, Family] = {
    "dalle": Family(
        "dalle.py:race",
        _dalle,
        _their_dalle,
        dalle_original.state_dict_from_original,
        DALLESampling(temperature=0.7, filter_thres=0.5),
        from_pixels=True,
    ),
    "maskgit": Family(
        "maskgit.py:race",
        _maskgit,
        _grid,
        maskgit_original.state_dict_from_original,
        MaskGitSampling(timesteps=12, temperature=1.0, topk_filter_thres=0.5, cond_scale=2.0),
    ),
    "parti": Family(
        "parti.py:race",
        _parti,
        _their_parti,
        parti_original.state_dict_from_original,
        PartiSampling(temperature=0.5, filter_thres=0.5, cond_scale=1.4),
    ),
}


def told(config: Any, ids: Tensor, words: int) -> dict[str, Tensor]:
    """What a batch holds beside caption ids, for a model that is told states."""
    if getattr(config, "condition", None) is None:
        return {}
    return {TEXT_EMBEDS: caption_states(ids, words), TEXT_EMBEDS_MASK: ids != 0}


def train(
    *,
    inputs: str,
    weights: str,
    seconds: float,
    batch_size: int,
    model: dict[str, Any],
    words: int,
    tokenizer: str | None,
    dtype: EngineDtype,
    loop: dict[str, Any],
) -> Callable[[], object]:
    """Our side: steps of the engine that `tokscale train` builds.

    Args:
        inputs: File of `text`, `codes`, and `pixels`.
        weights: File that gets the weights after each slice.
        seconds: Of a slice.
        batch_size: Samples of a step.
        model: Our configuration.
        words: Entries of the text vocabulary.
        tokenizer: Folder of the image tokenizer that makes codes of the pixels once, on this side's clock; None for a
            race of sides that are both given the codes.
        dtype: Of the products.
        loop: As of `racing.plain_loop`.
    """
    data, config = torch.load(inputs, weights_only=True), decode(ModelConfig, model, where="model")
    image = None if tokenizer is None else load_image_tokenizer(tokenizer)
    codes: list[Tensor] = []
    engine = _engine(config, dtype, loop, batch_size)

    def prepare() -> None:
        made = data["codes"] if image is None else torch.cat([image.encode(part) for part in data["pixels"].split(256)])
        codes.append(made)

    positions = [0]

    def update(step: int, rows: Tensor) -> Tensor:
        text = data["text"][rows]
        seen = torch.arange(positions[0], positions[0] + len(rows))  # which captions are hidden follows from these
        positions[0] += len(rows)
        batch = TokenBatch(seen, text, text != 0, codes[0][rows], extra=told(config, text, words))
        with rng.scope(0, "race", step):
            loss = engine(batch).total
            engine.backward(loss)
            engine.step(step)
        return loss.detach()

    def write() -> None:
        torch.save(engine.model.state_dict(), weights)

    return Slices(seconds, batches(len(data["text"]), batch_size), update, write, prepare)


def _engine(config: Config, dtype: EngineDtype, loop: Mapping[str, Any], batch_size: int) -> Engine:
    """What `tokscale train` builds for the loop of `racing.plain_loop`."""

    def make() -> nn.Module:
        with rng.scope(0, "init", "race"):
            return build_model(config)

    betas: Sequence[float] = loop["betas"]
    return build_engine(
        "model",
        make,
        config=EagerConfig(dtype=dtype, gradient_clipping=loop["clip"]),
        optimizer=AdamWConfig(lr=loop["lr"], betas=(betas[0], betas[1]), weight_decay=0.0),
        schedule=ScheduleConfig(kind="constant", warmup_steps=loop["warmup_steps"]),
        comm=Comm(ProcessEnv()),
        micro_batches=1,
        micro_batch_size=batch_size,
        total_steps=TOTAL_STEPS,
    )
