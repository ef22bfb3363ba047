"""Options of MaskGIT and Muse, under the names of the original (muse-maskgit-pytorch 0.3.5)."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tokscale.base.config import Config, LayerCount
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.models.common import fit_sizes
from tokscale.models.grids import Grid, GridsConfig
from tokscale.nn.conditioning import CaptionConfig, ConditionConfig
from tokscale.nn.guidance import GuidedSampling

Schedule = Literal["cosine", "arccos", "linear", "pow"]


class BlocksConfig(Config):
    """Sizes of a bidirectional transformer, each layer of which may attend to a context too."""

    dim: PositiveInt
    """Width of the residual stream."""
    depth: LayerCount
    """Layers, each self-attention, cross-attention and feed-forward."""
    dim_head: PositiveInt = 64
    """Width of one head."""
    heads: PositiveInt = 8
    """Attention heads."""
    ff_mult: float = Field(default=4, gt=0)
    """Two thirds of this, times `dim`, is the width of the feed-forward's gated hidden layer."""
    scale: float = Field(default=8, gt=0)
    """Factor of the attention logits, which are cosines times learned scales."""
    flash: bool = True
    """Fused attention. False computes every probability explicitly: the same numbers, more time and memory."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of attention probabilities."""
    remat: Literal["none", "block"] = "none"
    """Recompute a layer's activations in the backward pass; those of its feed-forward are in any case."""


class CriticConfig(BlocksConfig):
    """A transformer of its own that says of each code whether it is out of place (Token-Critic, arXiv:2209.04439)."""


class LowresConfig(Config):
    """Super-resolution: what is told of the same image's codes at a lower resolution."""

    image_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of the low-resolution codes. Taken from the data when left out."""
    num_tokens: PositiveInt | None = None
    """Entries of the low-resolution tokenizer's codebook. Taken from the data when left out; without data, that of the
    model's own codes."""
    fingerprint: str | None = None
    """Of the low-resolution tokenizer, as the data say it."""
    layout: Literal["cross", "encoder"] = "cross"
    """`cross`: embedded low-resolution codes stand beside the text states, and layers attend to both (the original).
    `encoder`: self-attention layers read them first (Muse, arXiv:2301.00704)."""
    depth: LayerCount = 2
    """Layers of `layout=encoder`; 16 in Muse."""
    shared_emb: bool = False
    """Embed low-resolution codes with the model's own table, as the original does; the codebook must be the same."""

    @model_validator(mode="after")
    def _one_table(self) -> Self:
        if self.shared_emb and self.num_tokens is not None:
            raise ValueError("shared_emb takes the model's own codebook; leave num_tokens out")
        return self


class MaskGitConfig(BlocksConfig, GridsConfig):
    """Masked codes are predicted all at once from those that are known and from what is told beside the image."""

    kind: Literal["maskgit"] = "maskgit"
    num_tokens: PositiveInt | None = None
    """Entries of the image tokenizer's codebook. Taken from the tokenizer when left out."""
    image_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of the image's codes. Taken from the tokenizer when left out."""
    condition: ConditionConfig = CaptionConfig()
    """What the model is told: its own caption encoder, a frozen encoder's states, or a class."""
    num_text_tokens: int | None = Field(default=None, ge=2)
    """Entries of the text tokenizer, for `condition.kind=caption`. Taken from the tokenizer when left out."""
    text_seq_len: PositiveInt = 64
    """Width of the caption ids."""
    lowres: LowresConfig | None = None
    """Makes this a super-resolution model, which reads the stream `codes.low` of the data."""
    self_cond: bool = False
    """Feed the hidden states of a first look back into a second one (arXiv:2208.04202)."""
    self_cond_prob: float = Field(default=0.9, ge=0, le=1)
    """Share of training samples whose first look is fed back; the others see zeros."""
    noise_schedule: Schedule = "cosine"
    """Share of masked codes at time `t` in [0, 1]: `cosine` cos(t pi/2), `arccos` arccos(t) 2/pi, `linear` 1 - t,
    `pow` 1 - t^schedule_power."""
    schedule_power: float = Field(default=2.0, gt=0)
    """Exponent of `pow`."""
    min_masking_rate: float = Field(default=0.0, ge=0, le=1)
    """Least share of codes that training masks; at least one code always is."""
    loss_mean: Literal["expected", "tokens"] = "expected"
    """What the sum over masked codes is divided by. `expected`: the number that the schedule masks on average, so that
    the loss does not depend on how a batch is split. `tokens`: the number in this micro batch (the original)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label spread over the codebook; 0.1 in MaskGIT."""
    cond_drop_prob: float = Field(default=0.5, ge=0, le=1)
    """Share of training samples that are told nothing, which is what guidance needs; 0.1 in Muse."""
    no_mask_token_prob: float = Field(default=0.0, ge=0, le=1)
    """Share of the codes to predict that stay visible, as in BERT; `can_remask_prev_masked` needs some."""
    token_critic: CriticConfig | None = None
    """A separate critic, trained on what the model draws at masked places."""
    self_token_critic: bool = False
    """The model judges its own drawings by one more output."""
    critic_loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the critic's part: the loss is `generator + critic_loss_weight * critic`."""
    sample_temperature: float | None = Field(default=None, ge=0)
    """Temperature of the drawings that a critic learns from; uniform in [0, 1) per sample when left out."""
    train_only_generator: bool = False
    """Leave the critic as it is."""
    train_only_critic: bool = False
    """Leave the generator as it is: a critic that is trained afterwards. Begin with `init_from`."""

    @model_validator(mode="after")
    def _critics(self) -> Self:
        if self.token_critic is not None and self.self_token_critic:
            raise ValueError("token_critic and self_token_critic exclude each other; take one of them")
        if self.train_only_generator and self.train_only_critic:
            raise ValueError("train_only_generator and train_only_critic leave nothing to train; set one of them")
        if (self.train_only_generator or self.train_only_critic) and not self.has_critic:
            raise ValueError("train_only_generator and train_only_critic need a critic: set token_critic")
        return self

    @property
    def has_critic(self) -> bool:
        """Whether there is something that judges codes."""
        return self.self_token_critic or self.token_critic is not None

    def fitted(self, image: ImageTokenizer, text: TextTokenizer | None) -> Self:
        """This configuration with its sizes taken from the tokenizers.

        Raises:
            ConfigError: When a size was given and is another, or the codes have more than one level.
        """
        if len(image.code_shape) != 2:
            raise ConfigError(
                f"model.kind=maskgit reads one code per grid cell, but the image tokenizer gives {image.code_shape}; "
                "choose a tokenizer without residual levels, or model.kind=rqtransformer"
            )
        return fit_sizes(
            self,
            num_tokens=(image.num_tokens, "image tokenizer"),
            image_grid=(tuple(image.code_shape), "image tokenizer"),
            num_text_tokens=(
                text.num_tokens if text is not None and self.condition.reads_captions else None,
                "text tokenizer",
            ),
        )

    def with_grids(self, grids: Sequence[Grid]) -> Self:
        """See `AnyModelConfig.with_grids`.

        Raises:
            ConfigError: For a model of super-resolution, whose low-resolution codes have one grid.
        """
        if self.lowres is not None:
            raise ConfigError(
                "model.lowres: a super-resolution model trains on one shape of images; read one bucket: "
                "data.sources=[{path: FOLDER, buckets: [NAME]}]"
            )
        return super().with_grids(grids)

    def with_lowres(self, num_tokens: int, image_grid: tuple[int, ...], fingerprint: str, *, source: str) -> Self:
        """This configuration with the sizes of its low-resolution codes taken from the data.

        Args:
            num_tokens: Entries of their codebook.
            image_grid: Their rows and columns.
            fingerprint: Of the tokenizer that made them.
            source: The stream and its folder, for messages.

        Raises:
            ConfigError: When one was given and is another, or the codes have more than one level.
        """
        assert self.lowres is not None
        if len(image_grid) != 2:
            raise ConfigError(
                f"model.lowres reads one code per grid cell, but the {source} has {image_grid}; tokenize with "
                "streams={low: FOLDER} of a tokenizer without residual levels"
            )
        if self.lowres.shared_emb and num_tokens != self.num_tokens:
            raise ConfigError(
                f"model.lowres.shared_emb: the {source} has {num_tokens} codes, the model's own table {self.num_tokens}"
                "; leave the key out"
            )
        lowres = fit_sizes(
            self.lowres,
            "model.lowres",
            num_tokens=(None if self.lowres.shared_emb else num_tokens, source),
            image_grid=(image_grid, source),
            fingerprint=(fingerprint, source),
        )
        return self.model_copy(update={"lowres": lowres})

    @property
    def sizes(self) -> tuple[int, tuple[int, int]]:
        """Image codes, and the grid.

        Raises:
            ConfigError: When they are neither given nor fitted.
        """
        if self.num_tokens is None or self.image_grid is None:
            raise ConfigError(
                "model.num_tokens and model.image_grid are not known yet; give them, or call "
                "`config.fitted(image_tokenizer, text_tokenizer)`"
            )
        return self.num_tokens, self.image_grid


class MaskGitSampling(GuidedSampling):
    """How codes are drawn from a trained MaskGIT."""

    timesteps: PositiveInt = 18
    """Looks at the image, each of which fixes some more codes."""
    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; falls linearly to 0 over the steps."""
    topk_filter_thres: float = Field(default=0.9, ge=0, lt=1)
    """Share of the codebook that is never drawn: 0.9 keeps the best tenth."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the most likely codes that together have this probability; 1 keeps all."""
    cond_scale: float = Field(default=3.0, ge=0)
    """See `GuidedSampling`; muse-maskgit-pytorch's default."""
    negative_prompt: str | None = None
    """A caption to be guided away from, in place of no caption at all."""
    can_remask_prev_masked: bool = False
    """Let codes that were fixed be masked again when they look unlikely later."""
    force_not_use_token_critic: bool = False
    """Choose what to mask again by the probability of the drawn codes although there is a critic."""
    critic_noise_scale: float = Field(default=1.0, ge=0)
    """Noise on the critic's scores; falls linearly to 0 over the steps."""
    choice_temperature: float = Field(default=0.0, ge=0)
    """Gumbel noise on the log-probabilities by which codes are kept (MaskGIT: 4.5); falls linearly to 0."""
    edit_iterations: int = Field(default=0, ge=0)
    """Mask-free editing: redraw `edit_rate` of the given image's codes this often, in place of the schedule."""
    edit_rate: float = Field(default=0.08, gt=0, le=1)
    """Share of the codes that one iteration of mask-free editing draws anew."""

    @property
    def steps(self) -> int:
        """Looks at the image: those of editing in place of the schedule's."""
        return self.edit_iterations or self.timesteps
