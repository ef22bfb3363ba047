"""Models of images of several shapes: which grids of codes they know, and which one a batch or a prompt is about."""

from collections.abc import Sequence
from typing import Any, Self

from pydantic import PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from tokscale.base.errors import ConfigError, DataError
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.models.model import AnyModelConfig

Grid = tuple[int, int]
"""Rows and columns of codes."""
MOST_GRIDS = 16
"""Each grid has masks, tables and compiled functions of its own, so there is an end to them."""


class GridsConfig(AnyModelConfig):
    """Base of the configurations of models that may read several grids. A subclass has `image_grid`."""

    image_grids: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    """Grids of the shapes of images that the model reads and draws, where there are several; `image_grid` is then the
    most rows and the most columns of them, and what is learned of places is learned for that. Taken from the data. The
    first is drawn where no size is asked for."""

    @model_validator(mode="after")
    def _several_below_the_largest(self) -> Self:
        grids = self.image_grids
        if not grids:
            return self
        if not 1 < len(set(grids)) == len(grids) <= MOST_GRIDS:
            raise ValueError(
                f"image_grids: got {list(grids)}; give 2 to {MOST_GRIDS} different ones, or image_grid alone for one"
            )
        if getattr(self, "image_grid", None) != largest(grids):
            raise ValueError(
                f"image_grids: {list(grids)} go with image_grid={largest(grids)}, their most rows and columns"
            )
        return self

    @model_serializer(mode="wrap")
    def _unless_one(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A model of one grid is described as ever: what is written of it does not change.
        values = handler(self)
        return values if self.image_grids else {key: value for key, value in values.items() if key != "image_grids"}

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All that it reads and draws; none where they are not known yet."""
        one: Grid | None = getattr(self, "image_grid", None)
        return self.image_grids or (() if one is None else (one,))

    def with_grids(self, grids: Sequence[Grid]) -> Self:
        """See `AnyModelConfig.with_grids`."""
        return self.model_validate(self.model_dump() | {"image_grid": largest(grids), "image_grids": tuple(grids)})

    def grid_of(self, codes: Int[Tensor, "batch *code_shape"]) -> Grid:
        """The grid of a batch.

        Args:
            codes: In the tokenizer's shape; of a model of one grid, also as one row for each image.

        Raises:
            DataError: When it is none of the model's.
        """
        if len(self.grids) == 1:
            return self.grids[0]
        shape = tuple(codes.shape[1:])
        for grid in self.grids:
            if shape[:2] == grid:
                return grid
        raise DataError(f"codes of shape {shape} for a model with image_grids={list(self.grids)}")

    def asked_grid(self, grid: Grid | None) -> Grid:
        """The grid to draw: that one, or the first.

        Raises:
            ConfigError: When the model does not know it.
        """
        if grid is None:
            return self.grids[0]
        if grid not in self.grids:
            raise ConfigError(f"a grid of {grid} codes: this model draws {', '.join(map(str, self.grids))}")
        return grid


def first(table: Float[Tensor, "rows dim"], count: int) -> Float[Tensor, "count dim"]:
    """The first rows of a table; itself where these are all, since a slice is a copy in the backward pass."""
    return table if len(table) == count else table[:count]


def largest(grids: Sequence[Grid]) -> Grid:
    """The most rows and the most columns."""
    return max(rows for rows, _ in grids), max(columns for _, columns in grids)


def most_codes(grids: Sequence[Grid]) -> Grid:
    """The grid with the most codes, which costs most."""
    return max(grids, key=lambda grid: grid[0] * grid[1])
