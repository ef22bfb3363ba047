"""What the layers promise each other, so that siblings need not import each other.

The first half are interfaces. The second half is how single-device code asks the world outside for the few things it
cannot do alone; the defaults are right for one process and one unpartitioned model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from tokscale.base.batch import Batch, LossOutput, StepReport, StepResult
from tokscale.base.shapes import Bool, Float, Int, Shaped, UInt8
from tokscale.base.state import ShardSource, TensorShard

# --------------------------------------------------------------------------------------------------- interfaces


@runtime_checkable
class LossModel(Protocol):
    """A module that can be trained: `forward` maps a batch to its loss, and reads all its parameters inside it."""

    def __call__(self, batch: Any) -> LossOutput:
        """The loss of one micro batch."""
        ...

    def train_flops(self) -> float:
        """Floating-point operations of forward and backward for one sample (a multiply-add is two)."""
        ...

    def anneal(self, step: int) -> None:
        """Set what is scheduled by training progress (temperatures, loss weights) for optimizer step `step`."""
        ...


class ImageTokenizer(Protocol):
    """Images to codes and back. Always in eval mode, never trained by the model that uses it."""

    num_tokens: int
    """Codes are in `[0, num_tokens)`."""
    image_size: int
    """Side of the square images, in pixels; the shorter side of others."""
    image_hw: tuple[int, int]
    """Rows and columns of the images, in pixels."""
    channels: int
    code_shape: tuple[int, ...]
    """`(grid_h, grid_w)` or `(grid_h, grid_w, levels)`."""
    fingerprint: str
    """sha256 over weights, preprocessing and dtype policy: ids from another fingerprint are other ids."""

    def encode(self, pixels: UInt8[Tensor, "batch channels height width"]) -> Int[Tensor, "batch *code_shape"]:
        """The codes of images; deterministic."""
        ...

    def decode(self, codes: Int[Tensor, "batch *code_shape"]) -> UInt8[Tensor, "batch channels height width"]:
        """The images that codes stand for, clamped to the range of pixels."""
        ...


class TextTokenizer(Protocol):
    """Captions to ids and back. Id 0 is padding and never a real token."""

    num_tokens: int
    fingerprint: str

    def encode(
        self, captions: Sequence[str], length: int
    ) -> tuple[Int[Tensor, "batch text"], Bool[Tensor, "batch text"]]:
        """Ids right-padded with 0 to `length`, and a mask that is True at real tokens."""
        ...

    def decode(self, ids: Int[Tensor, "batch text"]) -> list[str]:
        """The captions, padding left out."""
        ...


class TextEncoder(Protocol):
    """Captions to the states of a frozen language model (T5 and others). Always in eval mode, never trained here."""

    width: int
    """Of each state."""
    fingerprint: str
    """sha256 over weights, tokenizer, longest text and dtype policy."""

    def tokenize(self, captions: Sequence[str]) -> tuple[Int[Tensor, "batch words"], Bool[Tensor, "batch words"]]:
        """The encoder's own ids and a mask, on the CPU, as wide as the longest caption needs. Safe in any thread."""
        ...

    def states(
        self, ids: Int[Tensor, "batch words"], mask: Bool[Tensor, "batch words"]
    ) -> Float[Tensor, "batch words width"]:
        """States of what `tokenize` gave, on the encoder's device; zero at padding."""
        ...

    def encode(self, captions: Sequence[str]) -> tuple[Float[Tensor, "batch words width"], Bool[Tensor, "batch words"]]:
        """States and a mask that is True at real tokens, as wide as the longest caption needs; padding is zero."""
        ...


class Engine(Protocol):
    """Parameters, gradients and optimizer of one model, on one rank of however many.

    A training step is: for each micro batch `backward(engine(batch).total)`, then one `step`.
    """

    name: str
    model: nn.Module
    device: torch.device
    dtype: str
    """`fp32` or `bf16`: the arithmetic of forward and backward."""
    keep_options: bool
    """Whether the configured options of the optimizer win over a checkpoint's: they were changed on the record."""

    def __call__(self, batch: Batch) -> LossOutput:
        """The model's forward pass on one micro batch, ready for `backward`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this micro batch's gradient; `loss` is divided by the number of micro batches inside."""
        ...

    def carry(self, values: Mapping[str, Tensor | float | Sequence[float]]) -> None:
        """Let the message of the next `step` carry these too: scalars as means over ranks, sequences as sums.

        Every rank gives the same names. The report's `outcome` has them.
        """
        ...

    def step(self, step: int) -> StepReport:
        """Check, clip and apply the accumulated gradient. `step` counts updates from 0 and sets the schedules.

        Waits for nothing: what became of it is told to the device at once, and to the host when the report is asked.
        """
        ...

    def gathered(self, *, by_module: bool = False) -> AbstractContextManager[nn.Module]:
        """The model with whole parameters, on every rank, for evaluation and sampling. Collective.

        Args:
            by_module: Where the engine shards them, each module's own are whole only while it is called: no rank holds
                the model, and every call is a collective. All ranks make the same calls in the same order.
        """
        ...

    def bytes_to_gather(self) -> int:
        """What a rank needs for `gathered` beside what it holds: all parameters where they are sharded, else 0."""
        ...

    def averaged(self, slot: str) -> AbstractContextManager[None]:
        """The weights replaced by one of their averages, e.g. `ema/0.999`, for measuring and drawing. Collective.

        Raises:
            ConfigError: When no such average is kept.
        """
        ...

    def shards(self) -> Iterator[TensorShard]:
        """This rank's share of every persistent tensor. The shares of all ranks tile each tensor exactly once."""
        ...

    def scalars(self) -> Mapping[str, Any]:
        """JSON-ready state that is equal on all ranks: update counters, group hyper-parameters."""
        ...

    def load(self, source: ShardSource) -> None:
        """Take over weights, moments, averages and counters, whatever layout they were saved from. Collective."""
        ...


class TrainTask(Protocol):
    """What one training step means for one or several named engines."""

    engines: Mapping[str, Engine]

    def step(self, batch: Any, step: int) -> StepResult:
        """Train on this rank's share of global batch number `step`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state of the task itself, beyond its engines."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        ...


class Loader(Protocol):
    """An endless stream of this rank's share of the global batches; its state is a position."""

    def next_batch(self) -> Batch:
        """This rank's rows of the next global batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready position in the stream, equal on all ranks."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position, at any number of ranks."""
        ...


# ------------------------------------------------------------------------------------- the world outside a module


class Collectives:
    """What a module may ask of the other data-parallel ranks. This default is the answer of a single process."""

    def gather_batch(self, local: Shaped[Tensor, "batch *rest"]) -> Shaped[Tensor, "world_batch *rest"]:
        """The batches of all ranks in rank order; differentiable, gradients return to the rank they came from."""
        return local

    def rank_offset(self, batch: int) -> int:
        """Where this rank's rows start in `gather_batch`'s result."""
        del batch
        return 0

    def all_sum(self, local: Tensor) -> Tensor:
        """Sum over ranks, without gradient: statistics such as codebook usage."""
        return local


class ParameterAccess:
    """What a module may ask of the engine that owns its parameters. This default is for whole parameters."""

    @property
    def whole(self) -> bool:
        """Whether parameters stay where they are in memory, whole, from one call of a module to the next."""
        return True

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Whole, readable parameters inside the context, where an engine keeps only shards. Collective."""
        del parameters
        return nullcontext()

    def accumulating(self, parameters: Iterable[nn.Parameter], *, last: bool) -> AbstractContextManager[None]:
        """Around one of several backward passes through a shared module within one step.

        An engine that reduces gradients as soon as they arrive must wait for the `last` pass: the passes before
        it only add. Called in backward order by the reversible stack.
        """
        del parameters, last
        return nullcontext()


class RegionCompiler:
    """How a module asks for its leaf regions (`nn/regions.py`) to be compiled. This default compiles nothing."""

    def compiled(self, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any] | None:
        """A compiled function of tensors that gives `function(*tensors, **options)`; None where none is wanted.

        Args:
            function: Plain tensor operations without parameters of their own.
            options: What is not a tensor, hashable. Other options make another function.
        """
        del function, options
        return None


_services: dict[type, Any] = {kind: kind() for kind in (Collectives, ParameterAccess, RegionCompiler)}
_T = TypeVar("_T")


def current(kind: type[_T]) -> _T:
    """The installed implementation of `Collectives`, `ParameterAccess` or `RegionCompiler`."""
    return _services[kind]


@contextmanager
def using(implementation: Collectives | ParameterAccess | RegionCompiler) -> Iterator[None]:
    """Let modules use `implementation` inside the context; `dist` and `engine` do this around training."""
    kind = next(kind for kind in _services if isinstance(implementation, kind))
    before = _services[kind]
    _services[kind] = implementation
    try:
        yield
    finally:
        _services[kind] = before
