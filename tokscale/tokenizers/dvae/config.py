"""Configuration of the discrete VAE."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tokscale.base.config import MOST_LAYERS, Config, LayerCount
from tokscale.tokenizers.annealing import Annealing, extremes

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


class DiscreteVAEConfig(Config):
    """Options of the original `DiscreteVAE`, its training script's annealing, and the DALL-E paper's loss."""

    kind: Literal["dvae"] = "dvae"
    image_size: PositiveInt = 256
    """Side of the square images in pixels; a multiple of `2 ** num_layers`."""
    num_tokens: Annotated[int, Field(ge=2)] = 512
    """Entries of the codebook."""
    codebook_dim: PositiveInt = 512
    """Width of a codebook entry."""
    num_layers: LayerCount = 3
    """Halvings of the resolution: the grid has side `image_size / 2 ** num_layers`."""
    num_resnet_blocks: Annotated[int, Field(ge=0, le=MOST_LAYERS)] = 0
    """Residual blocks at the grid's resolution, in the encoder and again in the decoder."""
    hidden_dim: PositiveInt = 64
    """Channels of every convolution."""
    channels: Literal[1, 3, 4] = 3
    """1 for grey, 3 for colour, 4 with transparency."""
    smooth_l1_loss: bool = False
    """Smooth L1 reconstruction loss in place of the mean squared error."""
    logit_laplace_loss: bool = False
    """The DALL-E paper's reconstruction loss (appendix A.3): the decoder gives a location and a scale per channel, and
    images are squeezed into [0.1, 0.9] for encoder and loss. Replaces `normalization`, which must be null."""
    temperature: float | Annealing = 0.9
    """Gumbel-softmax temperature: a constant, or an annealing over optimizer steps (the paper: 1 to 1/16)."""
    straight_through: bool = False
    """Decode hard one-hot samples; gradients pass as if they were soft."""
    reinmax: bool = False
    """Second-order gradient of the hard samples (Liu et al. 2023, arXiv:2304.08612); needs `straight_through`."""
    kl_div_loss_weight: float | Annealing = 0.0
    """Weight of KL(q || uniform), summed over the grid and averaged over images, in nats. The original divided by 1
    in place of the batch, so a weight that was tuned there for batch B is here B times larger. The DALL-E paper
    divides its 6.6 by the values of an image: 6.6 / (256 * 256 * 3)."""
    normalization: Normalization | None = ((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0))
    """Means and standard deviations per channel, cut to `channels`; null leaves images in [0, 1]."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % (1 << self.num_layers):
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of 2**num_layers={1 << self.num_layers}, "
                "so the grid would not be whole; change one of them"
            )
        if self.reinmax and not self.straight_through:
            raise ValueError("reinmax=true acts on hard samples only; set straight_through=true too, or reinmax=false")
        if self.smooth_l1_loss and self.logit_laplace_loss:
            raise ValueError("smooth_l1_loss and logit_laplace_loss are both true; choose one reconstruction loss")
        if extremes(self.temperature)[0] <= 0:
            raise ValueError(f"temperature={self.temperature} must stay above 0")
        if extremes(self.kl_div_loss_weight)[0] < 0:
            raise ValueError(f"kl_div_loss_weight={self.kl_div_loss_weight} must not be negative")
        self._check_normalization()
        return self

    def _check_normalization(self) -> None:
        if self.normalization is None:
            return
        if self.logit_laplace_loss:
            raise ValueError("logit_laplace_loss maps images into [0.1, 0.9] itself; set normalization=null")
        if min(len(values) for values in self.normalization) < self.channels:
            raise ValueError(f"normalization={self.normalization} has fewer than channels={self.channels} values")
        if min(self.normalization[1][: self.channels]) <= 0:
            raise ValueError(f"normalization has standard deviations {self.normalization[1]}; they must be positive")

    @property
    def grid(self) -> int:
        """Side of the square grid of codes."""
        return self.image_size >> self.num_layers

    def means_and_stds(self) -> Normalization | None:
        """`normalization` cut to the channels."""
        if self.normalization is None:
            return None
        means, stds = self.normalization
        return means[: self.channels], stds[: self.channels]

    def fingerprint_fields(self) -> dict[str, Any]:
        """What decides ids beside the weights (which carry every width and depth)."""
        return {
            "image_size": self.image_size,
            "num_tokens": self.num_tokens,
            "channels": self.channels,
            "normalization": self.means_and_stds(),
            "logit_laplace": self.logit_laplace_loss,
        }
