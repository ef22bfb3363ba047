"""Image tokenizers, text encoders and the cascade on a CUDA device that is not there; see `test_fake_models.py`."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from allowed import check
from ledger import DEVICE, Ledger, forget_tables, to_cuda
from model_cases import BATCH, base
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tokscale.base.batch import ImageBatch
from tokscale.base.config import Config, decode
from tokscale.inference.cascade import Cascade
from tokscale.inference.pretrained import Pretrained
from tokscale.models.maskgit import MaskGitConfig
from tokscale.models.registry import build_model
from tokscale.tokenizers.codec import FrozenImageTokenizer, ImageCodec, Precision
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.image import IMAGE_TOKENIZERS, codec_class, is_trainable
from tokscale.tokenizers.pretrained.openai_dvae import OpenAIDiscreteVAEConfig
from tokscale.tokenizers.pretrained.taming import TamingConfig
from tokscale.tokenizers.pretrained.torchscript import TorchScriptConfig
from tokscale.tokenizers.quantize.config import QuantizerConfig
from tokscale.tokenizers.text.encoder import FrozenTextEncoder
from tokscale.tokenizers.vqgan.config import NetworkConfig, VQGANConfig
from tokscale.tokenizers.vqgan.discriminator import Discriminator, ImagePairBatch
from tokscale.tokenizers.vqgan.perceptual import STAGES, PerceptualLoss, VGG16Features

pytestmark = pytest.mark.usefixtures("cuda")

SIZE = 16
CNN = {"kind": "cnn", "ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "z_channels": 8, "attn_resolutions": (8,)}
NETWORKS: dict[str, dict[str, Any]] = {
    "cnn": CNN,
    "resnet": {"kind": "resnet", "dim": 8, "layers": 2},
    "vit": {"kind": "vit", "dim": 24, "depth": 1, "heads": 2, "patch_size": 4},
}
QUANTIZERS: dict[str, list[dict[str, Any]]] = {
    "vq": [{}, {"cosine": True}, {"entropy_weight": 0.1}, {"update": "loss"}],
    "residual": [{"levels": 2}, {"levels": 2, "shared_codebook": False, "update": "loss"}],
    "lfq": [{"num_tokens": 64}, {"num_tokens": 64, "entropy_weight": 0.0}],
    "fsq": [{"levels": (3, 5)}],
}
DVAES: list[dict[str, Any]] = [
    {},
    {"straight_through": True},
    {"straight_through": True, "reinmax": True},
    {"smooth_l1_loss": True},
    {"logit_laplace_loss": True, "normalization": None},
    {"normalization": None, "num_resnet_blocks": 1},
    {"kl_div_loss_weight": 0.1, "channels": 1},
]
VQGANS: list[dict[str, Any]] = [
    {"l2_weight": 1.0},
    {"logit_laplace_weight": 1.0},
    {"freeze_encoder": True},
    {"adversarial": {"dim": 8, "layers": 1}},
    {"adversarial": {"dim": 8, "layers": 1, "loss": "bce", "adaptive": False, "gradient_penalty_weight": 1.0}},
    {"perceptual": {"vgg": "weights"}},
    {"channels": 4},
]


def trainable() -> Iterator[tuple[str, Config]]:
    """Every network with every quantizer, and every loss."""
    kinds = {kind for kind, codec in _ours().items() if is_trainable(codec)}
    assert kinds == {"dvae", "vqgan"}, f"a trainable tokenizer has no case here: {kinds}"
    for options in DVAES:
        small = {"image_size": SIZE, "num_layers": 2, "num_tokens": 32, "codebook_dim": 8, "hidden_dim": 8}
        yield f"dvae {options}", decode(DiscreteVAEConfig, small | options)
    for network in _kinds(NetworkConfig):
        for quantizer in _kinds(QuantizerConfig):
            for how in QUANTIZERS[quantizer] if network == "resnet" else QUANTIZERS[quantizer][:1]:
                yield f"{network} {quantizer} {how}", _vqgan(network, {"kind": quantizer, **how})
    for options in VQGANS:
        yield f"vqgan {options}", _vqgan("resnet", {"kind": "vq"}, **options)


def pretrained() -> Iterator[tuple[str, Config]]:
    """Published networks, small. TorchScript programs are opaque to fake tensors, and diffusers may be missing."""
    kinds = {kind for kind, codec in _ours().items() if not is_trainable(codec)}
    assert kinds == {"taming", "openai_dvae", "torchscript", "diffusers_vq"}, f"no case for one of {kinds}"
    small = {"image_size": SIZE, "resolution": SIZE, "num_tokens": 32, "embed_dim": 8, "z_channels": 8, "ch": 32}
    small |= {"ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (8,)}
    for quantizer, levels in (("nearest", 1), ("cosine", 1), ("gumbel", 1), ("residual", 2)):
        yield f"taming {quantizer}", decode(TamingConfig, small | {"quantizer": quantizer, "levels": levels})
    sizes = {"image_size": SIZE, "num_tokens": 32, "hidden_dim": 8, "codebook_dim": 8, "blocks": 1}
    yield "openai_dvae", decode(OpenAIDiscreteVAEConfig, sizes)


def _ours() -> dict[str, type[ImageCodec]]:
    """Not those that other packages bring."""
    usable = IMAGE_TOKENIZERS.usable()
    return {kind: codec for kind, codec in usable.items() if codec.__module__.startswith("tokscale.")}


def _kinds(union: Any) -> list[str]:
    return [cls.model_fields["kind"].default for cls in typing.get_args(typing.get_args(union)[0])]


def _vqgan(network: str, quantizer: dict[str, Any], **options: Any) -> VQGANConfig:
    if quantizer["kind"] in ("vq", "residual"):
        quantizer = {"num_tokens": 32, "dim": 4} | quantizer
    return decode(VQGANConfig, {"image_size": SIZE, "network": NETWORKS[network], "quantizer": quantizer} | options)


def _codec(config: Any) -> ImageCodec:
    forget_tables()
    return typing.cast(ImageCodec, to_cuda(codec_class(config)(config)))


def _images(channels: int) -> torch.Tensor:
    return torch.zeros(BATCH, channels, SIZE, SIZE, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "config"), [*trainable(), *pretrained()], ids=lambda value: str(value)[:60])
def test_a_tokenizer_encodes_and_decodes(name: str, config: Config, precision: Precision) -> None:
    codec = _codec(config).eval()
    with Ledger() as ledger:
        codes = codec.encode(_images(codec.channels), precision)
        assert codec.decode(codes, precision).device.type == "cuda"
    check(ledger, "encode and decode")


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(("name", "config"), list(trainable()), ids=lambda value: str(value)[:60])
def test_a_tokenizer_trains(name: str, config: Any, autocast: bool) -> None:
    codec: Any = _codec(config).train()
    judge = None
    if getattr(config, "perceptual", None):
        scales = [torch.ones(1, stage[-1], 1, 1, device=DEVICE) for stage in STAGES]
        codec.perceptual = PerceptualLoss(typing.cast(VGG16Features, to_cuda(VGG16Features())), scales)
    if getattr(config, "adversarial", None):
        judge = typing.cast(Discriminator, to_cuda(Discriminator(config.adversarial, codec.channels, SIZE)))
        codec.adversary = lambda rebuilt, real: (_score(judge, rebuilt), torch.zeros_like(rebuilt))
    positions = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
    batch = ImageBatch(positions=positions, pixels=_images(codec.channels))
    with Ledger() as ledger:
        codec.anneal(1)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = codec(batch).total
        loss.backward()
        if judge is not None:
            judge.anneal(4)
            real = torch.zeros(BATCH, codec.channels, SIZE, SIZE, device=DEVICE)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = judge(ImagePairBatch(positions=positions, real=real, rebuilt=real)).total
            loss.backward()
        with torch.no_grad():
            codec.eval()(batch)
    check(ledger, "train")


def _score(judge: Discriminator, rebuilt: torch.Tensor) -> torch.Tensor:
    return judge.generator_loss(judge.score(rebuilt)).detach()


def test_what_has_no_case_is_known() -> None:
    assert codec_class(TorchScriptConfig()), (
        "programs of TorchScript run outside of Python: fake tensors never see them"
    )


@pytest.mark.parametrize("kind", ["t5", "clip"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_text_encoder_makes_states(kind: str, precision: Any) -> None:
    with unset_fake_temporarily(), mock.patch("tokscale.tokenizers.text.encoder.tables_sha256", lambda tables: ""):
        encoder = FrozenTextEncoder(_text_model(kind), mock.Mock(), precision=precision, length=8)
    to_cuda(encoder._model, torch.bfloat16 if precision == "bf16" else None)
    encoder.device = DEVICE
    ids = torch.ones(BATCH, 6, dtype=torch.int64, device="cpu")
    with Ledger() as ledger:
        states = encoder.states(ids, ids == 1)
    assert states.device.type == "cuda"
    check(ledger, "text states")


def _text_model(kind: str) -> Any:
    import transformers

    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
        return transformers.T5EncoderModel(config)
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )


def test_a_cascade_draws_both_resolutions() -> None:
    low = _pretrained(base("maskgit", image_grid=(2, 2)))
    fine = _pretrained(base("maskgit", image_grid=(4, 4), lowres={"image_grid": (2, 2), "num_tokens": 64}))
    with Ledger() as ledger:
        images, small = Cascade(low, fine, {"timesteps": 2}).sample_both(["a", "b"], timesteps=2)
    assert images.device.type == small.device.type == "cpu"
    check(ledger, "cascade")


def _pretrained(config: Config) -> Pretrained:
    forget_tables()
    assert isinstance(config, MaskGitConfig) and config.image_grid is not None
    side = 4 * config.image_grid[0]
    codec = to_cuda(codec_class(cfg := _vqgan("resnet", {"kind": "vq", "num_tokens": 64}, image_size=side))(cfg))
    with mock.patch.object(type(codec), "content_sha256", lambda self: ""):
        tokenizer = FrozenImageTokenizer(typing.cast(ImageCodec, codec))
    words = mock.Mock()
    words.encode = lambda captions, length: (torch.ones(len(captions), length, dtype=torch.int64, device="cpu"),) * 2
    return Pretrained(
        folder=Path(),
        config=config,
        model=typing.cast(typing.Any, to_cuda(build_model(config)).eval()),
        image_tokenizer=tokenizer,
        text_tokenizer=words,
        device=DEVICE,
    )
