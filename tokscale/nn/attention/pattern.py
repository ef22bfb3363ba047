"""Which query may see which key: the one definition that every way of computing attention is held to.

An attention kind is one module of `kinds/` with one subclass of `AttentionKind`; `AttentionPattern` is a kind over a
token layout. Everything else of this folder asks the pattern, and none compares the names of kinds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, TypeVar

import torch

from tokscale.base.errors import ConfigError
from tokscale.base.registry import NameIn, Registry
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.nn.attention.retention import Retention
from tokscale.nn.attention.sparsity import SparseLayout, VariableLayout
from tokscale.nn.layout import TokenLayout

Backend = Literal["dense", "sdpa", "fast", "flex", "natten"]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of batch, head, query and key indices, broadcast against each other: True where the query sees the key."""


class FastPath(ABC):
    """The `fast` backend for one pattern: fused CPU calls over what is seen, without a mask over the whole sequence."""

    def refusal(self, length: int) -> str | None:
        """Why it cannot compute the first `length` positions, or None."""
        del length
        return None

    @abstractmethod
    def pays(self, length: int) -> bool:
        """Whether it beats a dense mask there, by measurements on a CPU (`bench attention`)."""

    @abstractmethod
    def __call__(
        self,
        q: Float[Tensor, "batch heads seq dim_head"],
        k: Float[Tensor, "batch heads seq dim_head"],
        v: Float[Tensor, "batch heads seq dim_head"],
    ) -> Float[Tensor, "batch heads seq dim_head"]:
        """The same function as `dense_attention`, gradients too."""


@dataclass(frozen=True)
class Neighbourhood:
    """A causal window on the image's grid with the query in its lower right corner, as NATTEN computes it."""

    kernel_size: int
    dilation: int


class AttentionKind(ABC):
    """What one name in `attn_types` means, with all its parts.

    A subclass that lacks one cannot be added to the registry: the import of its module fails. What is not abstract
    has a default that is right for every kind, if not the fastest.
    """

    name: ClassVar[str]
    """As in `attn_types`."""
    backends: ClassVar[tuple[Backend, ...]]
    """Values of `attn_backend` that apply to this kind; under any other one, the backend is chosen for it."""
    needs_grid: ClassVar[bool]
    """Whether it needs image positions."""
    is_full: ClassVar[bool] = False
    """Whether the causal flag says it all, so that no call needs a mask."""
    per_head: ClassVar[bool] = False
    """Whether heads see different keys."""
    is_random: ClassVar[bool] = False
    """Whether what is seen is drawn, anew for every attention function."""

    def check(self, pattern: "AttentionPattern") -> None:
        """Refuse what this kind cannot be over this layout, or in this direction.

        Raises:
            ConfigError: Naming the option and the way out.
        """
        del pattern

    @abstractmethod
    def mask_mod(self, pattern: "AttentionPattern", device: torch.device | str) -> MaskMod:
        """Who sees whom. Tensor operations alone, element by element, so that FlexAttention can compile it."""

    @abstractmethod
    def fast_path(self, pattern: "AttentionPattern") -> FastPath | None:
        """How it is cut into small dense problems, or None where no cut fits."""

    @abstractmethod
    def retention(self, pattern: "AttentionPattern") -> Retention:
        """What decoding keeps."""

    def pairs(self, pattern: "AttentionPattern", length: int) -> int:
        """Visible (query, key) cells of the first `length` positions, averaged over heads: its share of the FLOPs."""
        mask = pattern.dense(length, "cpu")
        return int(mask.sum()) // mask.shape[0]

    def block_order(self, pattern: "AttentionPattern", image: Int[Tensor, "positions"]) -> Int[Tensor, "positions"]:
        """Image positions, counted from 0, in an order that brings together what is seen together."""
        del pattern
        return image

    def neighbourhood(self, pattern: "AttentionPattern") -> Neighbourhood | None:
        """The window that NATTEN would compute, or None where it is no such window."""
        del pattern


KINDS: Registry[AttentionKind] = Registry("attn_types")
AttentionKindName = Annotated[str, NameIn(KINDS)]
"""A kind's name in a configuration."""

K = TypeVar("K", bound=AttentionKind)


def attention_kind(kind: type[K]) -> type[K]:
    """Class decorator: add a kind to the registry.

    Raises:
        TypeError: When a part is missing, or the name is taken.
    """
    missing = [part for part in ("name", "backends", "needs_grid") if not hasattr(kind, part)]
    if missing:
        raise TypeError(f"attention kind {kind.__name__} lacks {', '.join(missing)}")
    KINDS.add(kind.name, kind())
    return kind


@dataclass(frozen=True)
class AttentionPattern:
    """A boolean function of a query and a key position, over a token layout.

    Text sees text; an image token sees all text, and of the image what its kind shows. In a causal pattern nobody
    sees a later position. Hashable: tables that derive from it are made once.

    Raises:
        ConfigError: When the kind is unknown, or cannot be had over this layout, or not in this direction.
    """

    kind: AttentionKindName
    layout: TokenLayout
    causal: bool = True
    heads: int = 1
    kernel_size: int = 5
    dilation: int = 1
    conv_window: Literal["corner", "centered"] = "corner"
    sparse: SparseLayout = field(default_factory=VariableLayout)
    stream: int = 0
    """Tells apart the random blocks of different attention functions."""

    def __post_init__(self) -> None:
        if self.parts.needs_grid and not self.layout.image:
            raise ConfigError(
                f"attn_types: {self.kind!r} needs an image grid; a text-only sequence takes "
                f"{' or '.join(name for name, kind in KINDS.items() if not kind.needs_grid)}"
            )
        self.parts.check(self)

    def over(self, layout: TokenLayout) -> "AttentionPattern":
        """The same over another layout: for images of several shapes, one pattern of each."""
        return self if layout == self.layout else _over(self, layout)

    @property
    def parts(self) -> AttentionKind:
        """What the kind consists of."""
        return KINDS.find(self.kind)

    def mask_mod(self, device: torch.device | str) -> MaskMod:
        """The definition: a function of batch, head, query and key indices on `device`, True where query sees key.

        It works element by element over broadcast tensors, by tensor operations only, so that FlexAttention can compile
        it; what it looks up is made here, outside.
        """
        return self.parts.mask_mod(self, device)

    def visible(
        self, query: Int[Tensor, "queries"], key: Int[Tensor, "keys"]
    ) -> Bool[Tensor, "heads_or_one queries keys"]:
        """The mask between chosen positions. Heads are told apart only where the pattern does."""
        count = self.heads if self.parts.per_head else 1
        head = torch.arange(count, device=query.device)
        head = head[:, None, None]
        return self.mask_mod(query.device)(head, head, query[None, :, None], key[None, None, :])

    def dense(self, length: int, device: torch.device | str) -> Bool[Tensor, "heads_or_one length length"]:
        """The whole mask of the first `length` positions."""
        return _dense(self, length, str(device))

    def pairs(self, length: int) -> int:
        """Visible (query, key) cells of the first `length` positions, averaged over heads."""
        return self.parts.pairs(self, length)


def in_order(pattern: AttentionPattern, query: Tensor, key: Tensor) -> Tensor:
    """Whether the key does not come after the query; always, in a bidirectional pattern."""
    return key <= query if pattern.causal else (key >= 0) & (query >= 0)


@lru_cache(maxsize=256)
def _over(pattern: AttentionPattern, layout: TokenLayout) -> AttentionPattern:
    return replace(pattern, layout=layout)


@lru_cache(maxsize=32)
def _dense(pattern: AttentionPattern, length: int, device: str) -> Bool[Tensor, "heads_or_one length length"]:
    with torch.inference_mode(False):
        positions = torch.arange(length, device=device)
        return pattern.visible(positions, positions)
