"""The trainable quantized autoencoder."""

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokscale.base.batch import ImageBatch, LossOutput
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.tokenizers.codec import ImageCodec
from tokscale.tokenizers.dvae.laplace import logit_laplace_nll, most_likely_pixels, squeeze
from tokscale.tokenizers.quantize.build import build_quantizer
from tokscale.tokenizers.vqgan.config import VQGANConfig
from tokscale.tokenizers.vqgan.network import Decoder, build_network

Images = Float[Tensor, "batch channels height width"]
Maps = Float[Tensor, "batch dim grid_h grid_w"]


class VQGAN(ImageCodec):
    """Encoder, quantizer, decoder (Esser et al. 2021).

    With a residual quantizer it is an RQ-VAE, with transformers a ViT-VQGAN. In evaluation mode `forward` moves no
    codebook, so a held-out loss measures the tokenizer.
    """

    version: ClassVar[str] = "vqgan/1"

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config: VQGANConfig = config
        self.num_tokens = config.num_tokens
        self.image_size = config.image_size
        self.channels = config.channels
        self.code_shape = config.code_shape
        network = build_network(config)
        self.encoder = network.encoder
        self.quantizer = build_quantizer(config.quantizer)
        self.quant_conv = nn.Conv2d(network.features, self.quantizer.dim, 1)
        self.post_quant_conv = nn.Conv2d(self.quantizer.dim, network.restored, 1)
        self.decoder = network.decoder

    def forward(self, batch: ImageBatch) -> LossOutput:
        """Reconstruction and quantization losses.

        Raises:
            DataError: When the pictures are not of this model's size.
        """
        self.check_pixels(batch.pixels)
        target = batch.pixels.float() / 255
        quantized = self.quantizer(self.features(target))
        out = self._decoded(quantized.vectors).float()
        rebuilt = self._pictures(out)
        parts, weights = self._reconstruction(out, rebuilt, target)
        parts |= quantized.parts
        weights |= quantized.weights
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        with torch.no_grad():
            metrics = self.quantizer.usage(quantized.codes)
            metrics["reconstruction_error"] = (rebuilt.clamp(0, 1) - target).abs().mean()
        return LossOutput(total=total, parts=parts, weights=weights, metrics=metrics)

    def anneal(self, step: int) -> None:
        """Tell the quantizer the optimizer step."""
        self.quantizer.anneal(step)

    def train_flops(self) -> float:
        """Of forward and backward (twice forward) for one picture, the search for the nearest codes left out."""
        with torch.device("meta"), torch.no_grad():
            plain = type(self)(self.config).eval()
            with FlopCounterMode(display=False) as counted:
                features = plain.features(torch.empty(1, self.channels, self.image_size, self.image_size))
                plain._decoded(features)
        return 3.0 * counted.get_total_flops()

    def identity(self) -> dict[str, Any]:
        """See `ImageCodec.identity`."""
        return self.config.identity()

    def features(self, pixels: Images) -> Maps:
        """Features to be quantized, from pictures in [0, 1]."""
        return self.quant_conv(self.encoder((2 * pixels - 1).to(self.quant_conv.weight.dtype)))

    def quantize(self, features: Maps) -> Int[Tensor, "batch *code_shape"]:
        """Ids of features."""
        return self.quantizer.ids(features)

    def render(self, codes: Int[Tensor, "batch *code_shape"]) -> Images:
        """Pictures in [0, 1] of ids."""
        return self._pictures(self._decoded(self.quantizer.lookup(codes)).float())

    def _decoded(self, vectors: Maps) -> Float[Tensor, "batch out_channels height width"]:
        decoder = cast(Decoder, self.decoder)
        hidden = decoder.hidden(self.post_quant_conv(vectors.to(self.post_quant_conv.weight.dtype)))
        return decoder.conv_out(hidden)

    def _pictures(self, out: Float[Tensor, "batch out_channels height width"]) -> Images:
        """In [0, 1], from what the decoder gives."""
        if self.config.logit_laplace_weight:
            return most_likely_pixels(out[:, : self.channels])
        return (out + 1) / 2

    def _reconstruction(
        self, out: Float[Tensor, "batch out_channels height width"], rebuilt: Images, target: Images
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
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
