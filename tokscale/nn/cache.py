"""What a stack remembers between incremental steps."""

import torch

from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Float, Tensor
from tokscale.nn.attention.decode import KeyValueCache
from tokscale.nn.layout import TokenLayout


class Cache:
    """Keys and values of each layer, and the last tokens of each shift. Shapes never change; `offset` grows.

    One cache serves one batch from its first position on. Guidance takes one cache over a batch that holds the
    conditional and the null rows. Made by `Stack.new_cache`.
    """

    def __init__(
        self,
        attn: list[KeyValueCache],
        attn_history: list[Float[Tensor, "batch reach half_dim"] | None],
        ff_history: list[Float[Tensor, "batch reach half_dim"] | None],
        batch: int,
        layout: TokenLayout,
    ) -> None:
        self.attn = attn
        self.attn_history = attn_history
        self.ff_history = ff_history
        self.batch = batch
        self.layout = layout
        self.offset = 0
        """Positions appended so far, but for those of a `DeviceStep`, which the host does not follow."""

    def check(self, batch: int, new: int) -> None:
        """Raise unless `new` positions of `batch` samples fit.

        Raises:
            ConfigError: On another batch size, or beyond the end of the layout.
        """
        if batch != self.batch:
            raise ConfigError(f"cache: made for a batch of {self.batch}, got {batch} samples; make one per batch")
        if self.offset + new > self.layout.seq:
            raise ConfigError(
                f"cache: {self.offset} of {self.layout.seq} positions are filled, {new} more do not fit; "
                "make a new cache for a new sequence"
            )

    def reset(self) -> None:
        """Begin a new sequence in the same buffers."""
        self.offset = 0
        for history in self.attn_history + self.ff_history:
            if history is not None:
                history.zero_()

    def nbytes(self) -> int:
        """Memory held by the buffers."""
        histories = [tensor for tensor in self.attn_history + self.ff_history if tensor is not None]
        kept = sum(tensor.untyped_storage().nbytes() for tensor in histories)
        return kept + sum(layer.nbytes() for layer in self.attn)


def empty_history(batch: int, reach: int, half: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The memory of a token shift before the first position."""
    return torch.zeros(batch, reach, half, device=device, dtype=dtype)
