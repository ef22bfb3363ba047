"""Configuration of the quantizers."""

import math
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tokscale.base.config import Config
from tokscale.base.kinds import require_own

Weight = Annotated[float, Field(ge=0)]


class AnyQuantizerConfig(Config):
    """Base of the kinds of quantizers: what each says of its codes."""

    @property
    @abstractmethod
    def code_levels(self) -> int | None:
        """Codes of one place, which are then the last axis of all codes; None for one code without such an axis."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides ids beside its kind, the weights and the shape of codes; enters the fingerprint."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a kind without one of its parts."""
        super().__pydantic_init_subclass__(**kwargs)
        if "kind" in cls.model_fields:
            require_own(cls, AnyQuantizerConfig, ["code_levels", "identity"])


class _CodebookConfig(AnyQuantizerConfig):
    num_tokens: Annotated[int, Field(ge=2)] = 1024
    """Entries of a codebook."""
    dim: PositiveInt = 256
    """Width of an entry; the encoder's features are brought to it by a 1x1 convolution."""
    update: Literal["ema", "loss"] = "ema"
    """What moves the entries: moving averages of the features they stand for (over all ranks), or a loss and the
    optimizer."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the moving averages, per micro batch."""
    commitment_weight: Weight = 0.25
    """Of the squared distance that draws features to their entries, a mean over places, channels and levels."""
    codebook_weight: Weight = 1.0
    """Of the squared distance that draws entries to their features; `update: loss` only."""
    revive_below: Weight | None = None
    """An entry is dead when it stands for less than this share of what an even use would give it, and is moved to a
    feature drawn from the batches of all ranks. 0: never. null: 0.03 with `update: ema`, never with `update: loss`,
    whose entries belong to the optimizer."""
    revive_every: PositiveInt = 10
    """Optimizer steps between looking for the dead."""

    @model_validator(mode="after")
    def _only_averages_are_moved(self) -> Self:
        if self.update == "loss" and self.revive_below:
            raise ValueError(
                f"revive_below={self.revive_below} moves entries that update=loss leaves to the optimizer; use "
                "update=ema, or revive_below=0"
            )
        return self

    @property
    def revives(self) -> float:
        """`revive_below`, with its default filled in."""
        return (0.03 if self.update == "ema" else 0.0) if self.revive_below is None else self.revive_below


class VQConfig(_CodebookConfig):
    """One codebook (van den Oord et al. 2017; VQGAN, ViT-VQGAN, MaskGIT)."""

    kind: Literal["vq"] = "vq"
    cosine: bool = False
    """Bring features and entries to unit length first (ViT-VQGAN, LlamaGen)."""
    entropy_weight: Weight = 0.0
    """Of MaskGIT's entropy loss: each place sure of its entry, all entries used alike. MaskGIT: 0.1."""
    entropy_temperature: float = Field(default=0.01, gt=0)
    """Of the softmax over negative squared distances in it."""
    codebooks: ClassVar[int] = 1

    @property
    def code_levels(self) -> int | None:
        """One code a place."""
        return None

    def identity(self) -> dict[str, Any]:
        """How distances are taken."""
        return {"cosine": self.cosine}


class ResidualConfig(_CodebookConfig):
    """Each level quantizes what the levels before left over (RQ-VAE, Lee et al. 2022, arXiv:2203.01941)."""

    kind: Literal["residual"] = "residual"
    levels: PositiveInt = 4
    """Codes of one place."""
    shared_codebook: bool = True
    """One codebook for all levels, or one for each."""
    cosine: ClassVar[bool] = False
    entropy_weight: ClassVar[float] = 0.0
    entropy_temperature: ClassVar[float] = 1.0

    @property
    def code_levels(self) -> int | None:
        """One for each level."""
        return self.levels

    def identity(self) -> dict[str, Any]:
        """Nothing more."""
        return {}

    @property
    def codebooks(self) -> int:
        """One, or one for each level."""
        return 1 if self.shared_codebook else self.levels


class LFQConfig(AnyQuantizerConfig):
    """Lookup-free quantization: the signs of the features (MAGVIT-v2, Yu et al. 2023, arXiv:2310.05737)."""

    kind: Literal["lfq"] = "lfq"
    num_tokens: Annotated[int, Field(ge=2)] = 65_536
    """A power of two; its logarithm is the width of the features."""
    commitment_weight: Weight = 0.25
    """Of the squared distance from features to their signs."""
    entropy_weight: Weight = 0.1
    """Of the entropy loss: each place's entropy, less `diversity_gamma` times that of the mean over all places."""
    diversity_gamma: Weight = 4.0
    """Muse's original: 4, Parti's: 2."""
    entropy_inv_temperature: float = Field(default=100.0, gt=0)
    """Multiplies the logits in the entropies."""
    entropy_bits: Annotated[int, Field(ge=1, le=14)] = 8
    """The mean's entropy is summed over groups of at most so many bits. With all bits in one group it is exact, at the
    price of `2 ** bits` numbers for each place; the sum over groups is an upper bound."""

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.num_tokens & (self.num_tokens - 1):
            near = 1 << round(math.log2(self.num_tokens))
            raise ValueError(f"num_tokens={self.num_tokens} is no power of two, so no number of signs; try {near}")
        return self

    @property
    def dim(self) -> int:
        """Signs of one code."""
        return self.num_tokens.bit_length() - 1

    @property
    def code_levels(self) -> int | None:
        """One code a place."""
        return None

    def identity(self) -> dict[str, Any]:
        """Nothing more."""
        return {}


class FSQConfig(AnyQuantizerConfig):
    """Finite scalar quantization: each feature rounded to a few values (Mentzer et al. 2023, arXiv:2309.15505)."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2)], ...] = (8, 5, 5, 5)
    """Values of each feature; their product is the number of codes. The paper: (8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5)
    and (8, 8, 8, 6, 5) for 2^8, 2^10, 2^12 and 2^14."""

    @property
    def num_tokens(self) -> int:
        """Combinations of values."""
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        """Features of one code."""
        return len(self.levels)

    @property
    def code_levels(self) -> int | None:
        """One code a place: its `levels` are values of features."""
        return None

    def identity(self) -> dict[str, Any]:
        """The values of each feature."""
        return {"levels": self.levels}


QuantizerConfig = Annotated[VQConfig | ResidualConfig | LFQConfig | FSQConfig, Field(discriminator="kind")]
"""Any of them, discriminated by `kind`."""
