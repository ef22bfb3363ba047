"""How the image part of a sparse pattern is cut into small dense problems. The lines of a grid are such a cut."""

from dataclasses import dataclass
from typing import Literal, Protocol

from einops import rearrange

from tokscale.base.shapes import Float, Tensor


class Partition(Protocol):
    """Attention inside the image, as a batch of independent pieces.

    An image is whole rows of the grid. Every key that a query sees in the image is in the query's piece.
    """

    @property
    def causal(self) -> bool:
        """Within a piece, query i sees keys 0..i."""
        ...

    @property
    def reach(self) -> int:
        """Keys per piece."""
        ...

    @property
    def row_multiple(self) -> int:
        """An image must have this many rows, or a multiple."""
        ...

    def queries(self, image: Float[Tensor, "batch heads image dim"]) -> Float[Tensor, "folded pieces queries dim"]:
        """Each position once, in the order of the pieces."""
        ...

    def to_image(
        self, pieces: Float[Tensor, "folded pieces queries dim"], batch: int
    ) -> Float[Tensor, "batch heads image dim"]:
        """The inverse of `queries`."""
        ...

    def keys(self, image: Float[Tensor, "batch heads image dim"]) -> Float[Tensor, "folded pieces keys dim"]:
        """The keys of each piece; a position may be in several."""
        ...

    def scatter_add(
        self, pieces: Float[Tensor, "folded pieces keys dim"], batch: int
    ) -> Float[Tensor, "batch heads image dim"]:
        """The adjoint of `keys`: every position gets the sum of its occurrences."""
        ...

    def mask(self, like: Tensor, image: int) -> Float[Tensor, "one pieces queries keys"] | None:
        """0 where a query of a piece sees a key, else -inf; None when every key is seen, or `causal` says it all."""
        ...


@dataclass(frozen=True)
class RowsOrColumns:
    """Rows or columns of a grid: each is a sequence of its own."""

    height: int
    width: int
    along: Literal["row", "col"]
    causal: bool

    @property
    def reach(self) -> int:
        """Length of a line."""
        return self.width if self.along == "row" else self.height

    @property
    def row_multiple(self) -> int:
        """Any number of rows can be cut."""
        return 1

    def queries(self, image: Tensor) -> Tensor:
        """By line."""
        to = "(b h) r c d" if self.along == "row" else "(b h) c r d"
        return rearrange(image, f"b h (r c) d -> {to}", c=self.width)

    def to_image(self, pieces: Tensor, batch: int) -> Tensor:
        """Back to raster order."""
        of = "(b h) r c d" if self.along == "row" else "(b h) c r d"
        return rearrange(pieces, f"{of} -> b h (r c) d", b=batch)

    keys = queries
    scatter_add = to_image

    def mask(self, like: Tensor, image: int) -> None:
        """The causal flag says it all."""
        del like, image
