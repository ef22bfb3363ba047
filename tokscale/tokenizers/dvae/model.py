"""The discrete VAE."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tokscale.base.batch import ImageBatch, LossOutput
from tokscale.base.shapes import Float, Int, Shaped, Tensor
from tokscale.nn.constants import constant
from tokscale.tokenizers.annealing import value_at
from tokscale.tokenizers.codec import ImageCodec
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.laplace import logit_laplace_nll, most_likely_pixels, squeeze
from tokscale.tokenizers.dvae.layers import Codebook, CodeLogits, ReluConv, ReluUpsample, ResBlock
from tokscale.tokenizers.dvae.relaxation import relaxed_sample
from tokscale.tokenizers.quantize.base import codebook_usage

Images = Float[Tensor, "batch channels height width"]


class DiscreteVAE(ImageCodec):
    """Convolutions to a grid of categorical codes and back (Ramesh et al. 2021; DALLE-pytorch's `DiscreteVAE`).

    In training mode `forward` decodes Gumbel-softmax samples from torch's default generator. In evaluation mode it
    decodes the most likely codes, which is what the tokenizer will do, so a held-out loss measures the tokenizer.
    """

    config_class = DiscreteVAEConfig
    is_trainable = True
    version: ClassVar[str] = "dvae/1"

    def __init__(self, config: DiscreteVAEConfig):
        super().__init__()
        self.config: DiscreteVAEConfig = config
        self.num_tokens = config.num_tokens
        self.image_size = config.image_size
        self.channels = config.channels
        self.code_shape = (config.grid, config.grid)
        self.temperature = 0.0
        self.kl_div_loss_weight = 0.0
        self.anneal(0)
        self.encoder = _encoder(config)
        self.to_logits = CodeLogits(config.hidden_dim, config.num_tokens, 1)
        self.codebook = Codebook(config.num_tokens, config.codebook_dim)
        self.decoder = _decoder(config)

    def forward(self, batch: ImageBatch) -> LossOutput:
        """Reconstruction loss and KL divergence of the codes from uniform.

        Raises:
            DataError: When the images are not of this model's size.
        """
        self.check_pixels(batch.pixels)
        target = batch.pixels.float() / 255
        logits = self.logits(target)
        out = self.decoder(self.codebook(self._code_weights(logits))).float()
        parts = {"reconstruction": self._reconstruction_loss(out, target), "kl": kl_from_uniform(logits)}
        total = parts["reconstruction"] + self.kl_div_loss_weight * parts["kl"]
        with torch.no_grad():
            metrics = codebook_usage(logits.argmax(dim=1), self.num_tokens)
            metrics["reconstruction_error"] = (self._to_pixels(out).clamp(0, 1) - target).abs().mean()
            metrics["temperature"] = target.new_full((), self.temperature)
            metrics["kl_weight"] = target.new_full((), self.kl_div_loss_weight)
        weights = {"reconstruction": 1.0, "kl": self.kl_div_loss_weight}
        return LossOutput(total=total, parts=parts, weights=weights, metrics=metrics)

    def anneal(self, step: int) -> None:
        """Set temperature and KL weight for optimizer step `step`."""
        self.temperature = value_at(self.config.temperature, step)
        self.kl_div_loss_weight = value_at(self.config.kl_div_loss_weight, step)

    def logits(self, pixels: Images) -> Float[Tensor, "batch vocab grid_h grid_w"]:
        """fp32 logits of the codes, from images in [0, 1]."""
        return self.to_logits(self.features(pixels)).float()

    def train_flops(self) -> float:
        """Floating-point operations of forward and backward (twice forward) for one image."""
        total, side = 0.0, float(self.image_size)
        for layer in [*self.encoder.modules(), self.to_logits, self.codebook, *self.decoder.modules()]:
            if isinstance(layer, nn.ConvTranspose2d):
                total += _conv_flops(layer, side)
                side *= layer.stride[0]
            elif isinstance(layer, nn.Conv2d):
                side /= layer.stride[0]
                total += _conv_flops(layer, side)
            elif isinstance(layer, Codebook):
                total += 2 * side**2 * layer.num_embeddings * layer.embedding_dim
        return 3 * total

    def fingerprint_fields(self) -> dict[str, Any]:
        """See `ImageCodec.fingerprint_fields`."""
        return self.config.fingerprint_fields()

    def features(self, pixels: Images) -> Float[Tensor, "batch hidden grid_h grid_w"]:
        """Encoder activations before the codes' logits, from images in [0, 1]."""
        return self.encoder(self._normalize(pixels).to(self.codebook.weight.dtype))

    def quantize(self, features: Float[Tensor, "batch hidden grid_h grid_w"]) -> Int[Tensor, "batch grid_h grid_w"]:
        """The most likely code of each place."""
        return self.to_logits(features).argmax(dim=1)

    def decode_to_unit_range(self, codes: Int[Tensor, "batch grid_h grid_w"]) -> Images:
        """Images in [0, 1] of codes."""
        return self._to_pixels(self.decoder(self.codebook(codes)).float())

    def _code_weights(self, logits: Float[Tensor, "batch vocab grid_h grid_w"]) -> Shaped[Tensor, "batch *codes"]:
        if not self.training:
            return logits.argmax(dim=1)
        options = self.config
        return relaxed_sample(
            logits, self.temperature, straight_through=options.straight_through, reinmax=options.reinmax
        )

    def _normalize(self, pixels: Images) -> Images:
        if self.config.logit_laplace_loss:
            return squeeze(pixels)
        if (statistics := self._statistics(pixels)) is None:
            return pixels
        means, stds = statistics
        return (pixels - means) / stds

    def _to_pixels(self, out: Float[Tensor, "batch out_channels height width"]) -> Images:
        if self.config.logit_laplace_loss:
            return most_likely_pixels(out[:, : self.channels])
        if (statistics := self._statistics(out)) is None:
            return out
        means, stds = statistics
        return out * stds + means

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        if (statistics := self.config.means_and_stds()) is None:
            return None
        means, stds = (rearrange(constant(values, like.dtype, like.device), "c -> c 1 1") for values in statistics)
        return means, stds

    def _reconstruction_loss(self, out: Float[Tensor, "batch out_channels height width"], target: Images) -> Tensor:
        target = self._normalize(target)
        if self.config.logit_laplace_loss:
            location, log_scale = out.chunk(2, dim=1)
            return logit_laplace_nll(location, log_scale, target)
        return F.smooth_l1_loss(out, target) if self.config.smooth_l1_loss else F.mse_loss(out, target)


def kl_from_uniform(logits: Float[Tensor, "batch vocab grid_h grid_w"]) -> Float[Tensor, ""]:
    """KL(q || uniform) in nats, summed over the grid and averaged over the batch."""
    log_q = F.log_softmax(logits, dim=1)
    log_vocab = torch.log(log_q.new_full((), float(logits.shape[1])))
    return (log_q.exp() * (log_q + log_vocab)).sum() / len(logits)


def _encoder(config: DiscreteVAEConfig) -> nn.Sequential:
    width = config.hidden_dim
    layers: list[nn.Module] = []
    for layer in range(config.num_layers):
        inputs = width if layer else config.channels
        layers.append(nn.Sequential(ReluConv(inputs, width, 4, stride=2, padding=1), nn.ReLU()))
    layers += [ResBlock(width) for _ in range(config.num_resnet_blocks)]
    return nn.Sequential(*layers)


def _decoder(config: DiscreteVAEConfig) -> nn.Sequential:
    width, inputs = config.hidden_dim, config.codebook_dim
    layers: list[nn.Module] = []
    if config.num_resnet_blocks:
        layers += [nn.Conv2d(inputs, width, 1), *(ResBlock(width) for _ in range(config.num_resnet_blocks))]
        inputs = width
    for _ in range(config.num_layers):
        layers.append(nn.Sequential(ReluUpsample(inputs, width, 4, stride=2, padding=1), nn.ReLU()))
        inputs = width
    outputs = config.channels * (2 if config.logit_laplace_loss else 1)
    return nn.Sequential(*layers, nn.Conv2d(width, outputs, 1))


def _conv_flops(layer: nn.Conv2d | nn.ConvTranspose2d, side: float) -> float:
    """Two operations per weight and place on the small side of the convolution."""
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    return 2 * side**2 * layer.in_channels * layer.out_channels * kernel
