"""Options of DALL-E, under the names of the original (dalle-pytorch 1.6.6)."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tokscale.base.errors import ConfigError
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.models.common import fit_sizes
from tokscale.models.grids import GridsConfig
from tokscale.nn.config import StackConfig
from tokscale.nn.guidance import GuidedSampling


class DALLEConfig(StackConfig, GridsConfig):
    """A causal transformer over `[start, text, image codes]`, with one vocabulary for text and one for images."""

    kind: Literal["dalle"] = "dalle"
    num_text_tokens: int | None = Field(default=None, ge=2)
    """Entries of the text tokenizer, id 0 being padding. Taken from the tokenizer when left out."""
    text_seq_len: int = Field(default=256, ge=1)
    """Caption tokens, without the start token. Every padding position has an id of its own, which is learned."""
    num_image_tokens: int | None = Field(default=None, ge=1)
    """Entries of the image tokenizer's codebook. Taken from the tokenizer when left out."""
    image_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of the image's codes. Taken from the tokenizer when left out."""
    shift_tokens: bool = True
    """Feed part of the channels from the previous token, or from the neighbours above and to the left."""
    loss_img_weight: float = Field(default=7.0, ge=0)
    """Weight `w` of the image part: the loss is `(text + w * image) / (w + 1)`."""
    share_input_output_emb: bool = False
    """Embed with the output projection's weights (biases are not shared)."""
    sparse_attn: bool | tuple[bool, ...] = False
    """The original's switch, dead there: true makes every layer's attention `sparse`; a tuple does so by layer."""
    null_cond_prob: float = Field(default=0.0, ge=0, le=1)
    """Share of training captions that are replaced by padding, which is what guidance at sampling time needs."""

    @model_validator(mode="before")
    @classmethod
    def _sparse_kinds(cls, values: Any) -> Any:
        switch, depth = (values.get("sparse_attn"), values.get("depth")) if isinstance(values, dict) else (None, None)
        if not switch or not isinstance(depth, int):
            return values
        kinds = values.get("attn_types") or "full"
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        switches = [switch] if isinstance(switch, bool) else list(switch)
        chosen = ("sparse" if switches[at % len(switches)] else kinds[at % len(kinds)] for at in range(depth))
        return values | {"attn_types": tuple(chosen)}

    def fitted(self, image: ImageTokenizer, text: TextTokenizer | None) -> Self:
        """This configuration with its sizes taken from the tokenizers.

        Raises:
            ConfigError: When a size was given and is another, or the codes have more than one level.
        """
        if len(image.code_shape) != 2:
            raise ConfigError(
                f"model.kind=dalle reads one code per grid cell, but the image tokenizer gives {image.code_shape}; "
                "choose a tokenizer without residual levels, or model.kind=rqtransformer"
            )
        return fit_sizes(
            self,
            num_image_tokens=(image.num_tokens, "image tokenizer"),
            image_grid=(tuple(image.code_shape), "image tokenizer"),
            num_text_tokens=(text.num_tokens if text is not None else None, "text tokenizer"),
        )

    @property
    def sizes(self) -> tuple[int, int, tuple[int, int]]:
        """Text entries, image codes, and the grid.

        Raises:
            ConfigError: When they are neither given nor fitted.
        """
        if self.num_text_tokens is None or self.num_image_tokens is None or self.image_grid is None:
            raise ConfigError(
                "model.num_text_tokens, model.num_image_tokens and model.image_grid are not known yet; give them, or "
                "call `config.fitted(image_tokenizer, text_tokenizer)`"
            )
        return self.num_text_tokens, self.num_image_tokens, self.image_grid


class DALLESampling(GuidedSampling):
    """How codes, or caption tokens, are drawn from a trained DALL-E."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 takes the most likely entry."""
    filter_thres: float = Field(default=0.5, ge=0, lt=1)
    """Share of the legal vocabulary that is never drawn: 0.9 keeps the best tenth (top-k)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the most likely entries that together have this probability; 1 keeps all."""
    num_init_img_tokens: int | None = Field(default=None, ge=0)
    """Codes of the priming image to keep; 7/16 of the grid when left out, as OpenAI did."""
