"""How an engine is asked for: where state lives, in which precision, and which optimizer moves it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from tokscale.base.config import Config
from tokscale.base.kinds import for_each, require_own
from tokscale.base.registry import ConfigOf
from tokscale.engine.optimizer import OPTIMIZERS, AnyOptimizerConfig, config_of

Decay = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]


EngineDtype = Literal["auto", "fp32", "bf16"]
COMPUTES_BF16 = for_each(EngineDtype, {"auto": False, "fp32": False, "bf16": True})
"""Whether forward and backward are in bf16; `auto` has been resolved by then."""


class _AnyEngine(Config):
    """What every engine understands."""

    dtype: EngineDtype = "fp32"
    """Arithmetic of forward and backward. Master weights, moments and the accumulated gradient are fp32 in both.
    `auto`: bf16 where every rank's device computes it natively, else fp32; a CPU without AVX-512 would take 20 times as
    long in bf16. The stages that train ask for `auto` by default, and go on in what their run folder records. bf16 is
    autocast in eager and ZeRO 0 and 1, whose residual stream stays fp32, and weights in bf16 in ZeRO 2 and 3, whose
    stream is bf16, too: half the activations, and losses that differ within what bf16 rounds."""
    tf32: bool = True
    """On CUDA, products of fp32 numbers in TF32: with the mantissa of fp16, at about eight times the speed."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the leaf regions of models (norm and token shift, rotary positions, gates, residuals, cross-entropy) with
    `torch.compile`, each to one pass over memory. `auto`: on CUDA; on CPUs their uncompiled forms are about as fast and
    need no minute of compilation at the start. Held-out losses and drawn images are computed uncompiled."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global L2 norm of the gradient; 0 leaves it as it is."""
    ema: tuple[Decay, ...] = ()
    """Decays of the exponential moving averages of the weights, one average each. Averaged on the local shard."""

    @field_validator("ema")
    @classmethod
    def _distinct(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"got {list(value)}; each decay names one average, so it can occur only once")
        return value

    def with_whole_weights(self) -> Self:
        """The same engine, but that every rank holds the weights whole; gradients and moments stay divided."""
        raise NotImplementedError

    @property
    def said(self) -> str:
        """In one word, for the names of measurements."""
        raise NotImplementedError

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds a part of the parameters alone."""
        raise NotImplementedError

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an engine that does not say them."""
        super().__pydantic_init_subclass__(**kwargs)
        require_own(cls, _AnyEngine, ["with_whole_weights", "said", "shards_weights"])


class EagerConfig(_AnyEngine):
    """Plain PyTorch: every rank holds everything. The oracle of the other engines, and the choice for one device."""

    kind: Literal["eager"] = "eager"

    def with_whole_weights(self) -> Self:
        """See `_AnyEngine`: they are whole."""
        return self

    @property
    def said(self) -> str:
        """See `_AnyEngine`."""
        return self.kind

    @property
    def shards_weights(self) -> bool:
        """See `_AnyEngine`."""
        return False


_REFUSED = {
    "zero_quantized_weights": "quantized weights on the wire have not run on GPUs here",
    "zero_quantized_gradients": "quantized gradients on the wire have not run on GPUs here",
    "zero_quantized_nontrainable_weights": "quantized frozen weights have not run on GPUs here",
    "mics_shard_size": "DeepSpeed 0.19.8 has no MiCS; zero_hpz_partition_size keeps gathering inside a node",
    "mics_hierarchical_params_gather": "DeepSpeed 0.19.8 has no MiCS",
}
"""Options of DeepSpeed that are known and not taken, and why."""


class ZeroConfig(_AnyEngine):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020): state divided over the ranks.

    What DeepSpeed would choose silently is set by `tokscale.engine.ds_config`; these choices have a reason to vary.
    """

    kind: Literal["zero"] = "zero"
    stage: Literal[0, 1, 2, 3] = 3
    """What is divided over the ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    reduce_bucket_size: PositiveInt | Literal["auto"] = "auto"
    """Elements gathered before a gradient reduction. `auto`: by the size of the model, at most 5e8."""
    prefetch_bucket_size: PositiveInt | Literal["auto"] = "auto"
    """Stage 3: elements fetched ahead of their use. `auto`: nine tenths of the reduce bucket."""
    param_persistence_threshold: int = Field(default=100_000, ge=0)
    """Stage 3: parameters with fewer elements stay whole on every rank. 0 divides every parameter."""
    overlap_comm: bool = False
    """Reduce gradients while the backward pass goes on. Faster on many GPUs; the first thing to switch off when only
    multi-node runs meet non-finite gradients. A CPU cannot show it: off, until a run on two or more GPUs is on file."""
    zero_hpz_partition_size: PositiveInt | Literal["node"] = 1
    """Stage 3 (hpZ of ZeRO++, arXiv:2306.10209): a second copy of the parameters in the working dtype, divided over so
    many neighbouring ranks, from which all but the first gathering of a step are served. `node`: the ranks of a node,
    so that only one gathering a step crosses nodes, for 2 bytes x parameters / ranks of a node in bf16. 1: none. It
    pays across nodes alone, hence off; a number that is not below the ranks of the job is 1 too. The groups are the
    process's, so all engines of a process agree on it."""
    max_live_parameters: int = Field(default=1_000_000_000, ge=0)
    """Stage 3: gathered elements that may stand at once, those fetched ahead included. 1e9 are 2 GB in bf16: a model
    below it may keep what it has gathered from forward to backward. 0 keeps and fetches nothing ahead."""
    max_reuse_distance: int = Field(default=1_000_000_000, ge=0)
    """Stage 3: a parameter that is used again within so many elements stays gathered. With the default, and within
    `max_live_parameters`, the last layers of forward are not gathered again for backward."""
    sub_group_size: PositiveInt = 1_000_000_000
    """Stage 3: elements that the optimizer updates at a time. On GPUs fewer and larger are faster, and 1e9 covers any
    model that is divided widely; less bounds what an update needs at once."""
    module_granularity_threshold: int = Field(default=0, ge=0)
    """Stage 3: modules with fewer elements per child are gathered whole, children and all. 0: none. For models of very
    many tiny modules; ours are gathered by layer already, and a model that shares layers must not be gathered so."""
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    """Precision of gradients on the wire; by default that of `dtype`, but fp32 from 64 ranks on: a sum of n terms in
    bf16 is off by about sqrt(n) / 256 of its size."""
    sharded_init: bool | Literal["auto"] = "auto"
    """Stage 3: divide each parameter as soon as its module is made, so that no rank ever holds the whole model. `auto`:
    from 1e9 parameters on, which every rank of a node would hold in 4 GB each."""
    offload_optimizer: bool = False
    """Keep master weights and moments in host memory and update them there."""

    @model_validator(mode="before")
    @classmethod
    def _unproven(cls, values: Any) -> Any:
        for key in _REFUSED.keys() & (values.keys() if isinstance(values, Mapping) else ()):
            raise ValueError(f"{key}: {_REFUSED[key]}; leave it out")
        return values

    @model_validator(mode="after")
    def _coherent(self) -> "ZeroConfig":
        for key in ("reduce_bucket_size", "prefetch_bucket_size"):
            value = getattr(self, key)
            if value != "auto" and value < 1:
                raise ValueError(f"{key}: got {value}; give a positive number of elements, or auto")
        if self.zero_hpz_partition_size != 1 and self.stage != 3:
            raise ValueError(f"zero_hpz_partition_size: parameters are whole at stage {self.stage}; use stage 3")
        if self.sharded_init is True and self.stage != 3:
            raise ValueError(f"sharded_init divides parameters, which stage {self.stage} keeps whole; use stage 3")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs divided optimizer state; use stage 1, 2 or 3")
        return self

    def with_whole_weights(self) -> Self:
        """See `_AnyEngine`: stage 3 alone divides them."""
        return self.model_copy(update={"stage": min(self.stage, 2), "sharded_init": False})

    @property
    def said(self) -> str:
        """See `_AnyEngine`: with its stage."""
        return f"{self.kind}{self.stage}"

    @property
    def shards_weights(self) -> bool:
        """See `_AnyEngine`: stage 3 does."""
        return self.stage == 3


EngineConfig = Annotated[EagerConfig | ZeroConfig, Field(discriminator="kind")]


def _in_auto(value: Any) -> Any:
    return {"dtype": "auto", **value} if isinstance(value, Mapping) else value


TrainingEngineConfig = Annotated[EngineConfig, BeforeValidator(_in_auto)]
"""The same as a key of a stage that trains, where `dtype` defaults to `auto`."""


class AdamWConfig(AnyOptimizerConfig):
    """AdamW (Loshchilov & Hutter 2019); defaults of DALL-E (Ramesh et al. 2021)."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.96)
    """Decay of the running mean of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    @field_validator("betas")
    @classmethod
    def _proper(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"got {list(value)}; each must lie in [0, 1)")
        return value


class LionConfig(AnyOptimizerConfig):
    """Lion (Chen et al. 2023, arXiv:2302.06675): half the optimizer state of AdamW."""

    kind: Literal["lion"] = "lion"
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate; three to ten times below AdamW's."""
    betas: Betas = (0.9, 0.99)
    """Interpolation of the update, and decay of the momentum."""


class AdafactorConfig(AnyOptimizerConfig):
    """Adafactor with the settings of Parti (Yu et al. 2022, arXiv:2206.10789, section 3.3)."""

    kind: Literal["adafactor"] = "adafactor"
    betas: Betas = (0.9, 0.96)
    """Decay of the momentum, and of the factored second moment (bias-corrected)."""
    clip_threshold: float = Field(1.0, ge=0)
    """Largest root mean square of one parameter's update before momentum; 0 leaves it as it is."""
    min_factor: int = Field(128, ge=1)
    """Matrices with a side below this keep a full second moment."""


class MuonConfig(AnyOptimizerConfig):
    """Muon for matrices and kernels, AdamW for the `no_decay` group; learning rates as for AdamW (arXiv:2502.16982)."""

    kind: Literal["muon"] = "muon"
    momentum: Beta = 0.95
    """Decay of the running mean of the gradient, applied twice (Nesterov)."""
    betas: Betas = (0.9, 0.96)
    """Of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """Of AdamW."""


OptimizerConfig = Annotated[AnyOptimizerConfig, ConfigOf(OPTIMIZERS, config_of)]


ScheduleKind = Literal["constant", "cosine", "linear", "inverse_sqrt", "exponential"]
ENDS_AT_ZERO = for_each(
    ScheduleKind, {"constant": True, "cosine": True, "linear": True, "inverse_sqrt": True, "exponential": False}
)
"""Whether `final_ratio` may be 0."""


class ScheduleConfig(Config):
    """The learning rate over the updates of a run, as a multiple of the peak."""

    kind: ScheduleKind = "cosine"
    """Shape of the decay after warm-up and hold."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates of linear rise; the last of them is at the peak."""
    hold_steps: int = Field(default=0, ge=0)
    """Updates at the peak before the decay begins (Parti: constant, then exponential)."""
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate of the last update over the peak; the floor of `inverse_sqrt`; `constant` does not read it."""

    @model_validator(mode="after")
    def _reachable(self) -> "ScheduleConfig":
        if self.final_ratio == 0 and not ENDS_AT_ZERO[self.kind]:
            raise ValueError(f"final_ratio: got 0; an {self.kind} decay never reaches it, give a positive ratio")
        return self
