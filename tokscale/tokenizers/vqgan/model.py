"""The trainable quantized autoencoder."""

from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokscale.base.batch import ImageBatch, LossOutput
from tokscale.base.protocols import Collectives, current
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.tokenizers.codec import ImageCodec, Opponent
from tokscale.tokenizers.dvae.laplace import logit_laplace_nll, most_likely_pixels, squeeze
from tokscale.tokenizers.fingerprint import weights_sha256
from tokscale.tokenizers.quantize.build import build_quantizer
from tokscale.tokenizers.vqgan.adversary import Adversary, last_layer_gradient, with_gradient
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.discriminator import Discriminator
from tokscale.tokenizers.vqgan.network import PixelDecoder, build_network
from tokscale.tokenizers.vqgan.perceptual import PerceptualLoss

Images = Float[Tensor, "batch channels height width"]
Maps = Float[Tensor, "batch dim grid_h grid_w"]
Out = Float[Tensor, "batch out_channels height width"]


class VQGAN(ImageCodec):
    """Encoder, quantizer, decoder (Esser et al. 2021).

    With a residual quantizer it is an RQ-VAE, with transformers a ViT-VQGAN. In evaluation mode `forward` moves no
    codebook, so a held-out loss measures the tokenizer.
    """

    config_class = VQGANConfig
    is_trainable = True
    version: ClassVar[str] = "vqgan/1"

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config: VQGANConfig = config
        self.num_tokens = config.num_tokens
        self.image_size = config.image_size
        self.channels = config.channels
        self.code_shape = config.code_shape
        self.any_size = config.network.any_size
        network = build_network(config)
        self.encoder = network.encoder
        self.quantizer = build_quantizer(config.quantizer)
        self.quant_conv = nn.Conv2d(network.features, self.quantizer.dim, 1)
        self.post_quant_conv = nn.Conv2d(self.quantizer.dim, network.restored, 1)
        self.decoder = network.decoder
        self.perceptual: PerceptualLoss | None = None
        """Set by who trains; not part of this network."""
        self.adversary: Adversary | None = None
        """Set by who trains, in the steps in which the discriminator counts."""
        if config.freeze_encoder:
            for part in self._deciding():
                part.requires_grad_(False).eval()

    def forward(self, batch: ImageBatch) -> LossOutput:
        """Reconstruction, quantization, and whichever of the perceptual and the adversarial loss has been set.

        Raises:
            DataError: When the images are not of this model's size.
        """
        self.check_pixels(batch.pixels)
        target = batch.pixels.float() / 255
        frozen = self.config.freeze_encoder
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            quantized = self.quantizer(self.features(target))
        hidden, out = self._decoded(quantized.vectors)
        rebuilt = self._images(out)
        parts, weights = self._reconstruction(out, rebuilt, target)
        if self.perceptual is not None and self.config.perceptual is not None:
            parts["perceptual"] = self.perceptual(rebuilt, target)
            weights["perceptual"] = self.config.perceptual.weight
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        with torch.no_grad():
            metrics = self.quantizer.usage(quantized.codes)
            metrics["reconstruction_error"] = (rebuilt.clamp(0, 1) - target).abs().mean()
        if self.adversary is not None and torch.is_grad_enabled():
            assert self.config.adversarial is not None
            fooled = with_gradient(2 * rebuilt - 1, *self.adversary(2 * rebuilt.detach() - 1, 2 * target - 1))
            metrics["adaptive_weight"] = self._adaptive_weight(hidden, out, total, fooled)
            parts["adversarial"] = metrics["adaptive_weight"] * fooled
            weights["adversarial"] = self.config.adversarial.weight
            total = total + weights["adversarial"] * parts["adversarial"]
        if not frozen:
            parts |= quantized.parts
            weights |= quantized.weights
            for name, part in quantized.parts.items():
                total = total + quantized.weights[name] * part
        return LossOutput(total=total, parts=parts, weights=weights, metrics=metrics)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but that what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.config.freeze_encoder:
            for part in self._deciding():
                part.eval()
        return self

    def anneal(self, step: int) -> None:
        """Tell the quantizer the optimizer step."""
        self.quantizer.anneal(step)

    def prepare_training(self, device: torch.device) -> None:
        """Read the weights of the perceptual loss, if there is one."""
        if self.config.perceptual is not None:
            self.perceptual = PerceptualLoss.from_files(self.config.perceptual).to(device)

    def opponent(self) -> Opponent | None:
        """The discriminator, if there is one."""
        options = self.config.adversarial
        if options is None:
            return None
        return Opponent(lambda: Discriminator(options, self.channels, self.image_size), options.start_step)

    @classmethod
    def published(cls, config: VQGANConfig) -> VQGANConfig:
        """Without the files of the perceptual loss."""
        return config.model_copy(update={"perceptual": None})

    def train_flops(self) -> float:
        """Of forward and backward (twice forward) for one image, the search for the nearest codes left out."""
        with torch.device("meta"), torch.no_grad():
            plain = type(self)(self.config).eval()
            with FlopCounterMode(display=False) as counted:
                features = plain.features(torch.empty(1, self.channels, self.image_size, self.image_size))
                plain._decoded(features)
        return 3.0 * counted.get_total_flops()

    def fingerprint_fields(self) -> dict[str, Any]:
        """See `ImageCodec.fingerprint_fields`."""
        return self.config.fingerprint_fields()

    def content_sha256(self) -> str:
        """Hash of the weights that decide ids: a decoder trained further leaves shards and models valid."""
        own = self.state_dict()
        decoding = ("decoder.", "post_quant_conv.")
        return weights_sha256({name: tensor for name, tensor in own.items() if not name.startswith(decoding)})

    def features(self, pixels: Images) -> Maps:
        """Features to be quantized, from images in [0, 1]."""
        signed = self.config.pixel_range == "signed"
        return self.quant_conv(self.encoder((2 * pixels - 1 if signed else pixels).to(self.quant_conv.weight.dtype)))

    def quantize(self, features: Maps) -> Int[Tensor, "batch *code_shape"]:
        """Ids of features."""
        return self.quantizer.ids(features)

    def decode_to_unit_range(self, codes: Int[Tensor, "batch *code_shape"]) -> Images:
        """Images in [0, 1] of ids."""
        return self._images(self._decoded(self.quantizer.lookup(codes))[1])

    def _deciding(self) -> tuple[nn.Module, ...]:
        """What ids depend on."""
        return self.encoder, self.quant_conv, self.quantizer

    def _decoded(self, vectors: Maps) -> tuple[Tensor, Out]:
        """What the decoder's last layer is given, and what it makes of it."""
        decoder = cast(PixelDecoder, self.decoder)
        hidden = decoder.hidden(self.post_quant_conv(vectors.to(self.post_quant_conv.weight.dtype)))
        return hidden, decoder.conv_out(hidden).float()

    def _images(self, out: Out) -> Images:
        """In [0, 1], from what the decoder gives."""
        if self.config.logit_laplace_weight:
            return most_likely_pixels(out[:, : self.channels])
        return (out + 1) / 2 if self.config.pixel_range == "signed" else out

    def _adaptive_weight(self, hidden: Tensor, out: Out, visible: Tensor, fooled: Tensor) -> Float[Tensor, ""]:
        """How much stronger the visible losses pull at the last layer than the adversarial one, over all ranks."""
        options = self.config.adversarial
        assert options is not None
        if not options.adaptive:
            return visible.new_ones(())
        norms = []
        for loss in (visible, fooled):
            (gradient,) = torch.autograd.grad(loss, out, retain_graph=True)
            local = last_layer_gradient(cast(PixelDecoder, self.decoder).conv_out, hidden.detach().float(), gradient)
            norms.append(current(Collectives).all_sum(local).norm())
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=options.adaptive_max)

    def _reconstruction(self, out: Out, rebuilt: Images, target: Images) -> tuple[dict[str, Tensor], dict[str, float]]:
        config = self.config
        parts, weights = (
            {},
            {"l1": config.l1_weight, "l2": config.l2_weight, "logit_laplace": config.logit_laplace_weight},
        )
        if config.l1_weight:
            parts["l1"] = 2 * F.l1_loss(rebuilt, target)
        if config.l2_weight:
            parts["l2"] = 4 * F.mse_loss(rebuilt, target)
        if config.logit_laplace_weight:
            location, log_scale = out.chunk(2, dim=1)
            parts["logit_laplace"] = logit_laplace_nll(location, log_scale, squeeze(target))
        return parts, {name: weights[name] for name in parts}
