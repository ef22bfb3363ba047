"""Where each position of a sequence lies: a prefix of text, then an image in raster order."""

from dataclasses import dataclass

from tokscale.base.errors import ConfigError


@dataclass(frozen=True)
class TokenLayout:
    """A prefix of `text` positions followed by `grid_h * grid_w` image positions, row by row.

    Image-only (`text=0`) and text-only (`grid_h = grid_w = 0`) layouts are legal, so that one stack serves encoders
    and decoders. A sequence may be shorter than its layout: position `i` means the same in both.
    """

    text: int
    """Prefix positions, the start token included where a model has one (seed: `text_seq_len + 1`)."""
    grid_h: int = 0
    """Rows of the token grid."""
    grid_w: int = 0
    """Columns of the token grid."""

    def __post_init__(self) -> None:
        if min(self.text, self.grid_h, self.grid_w) < 0 or bool(self.grid_h) != bool(self.grid_w) or not self.seq:
            raise ConfigError(
                f"token layout: text={self.text}, grid={self.grid_h}x{self.grid_w}; sizes are >= 0, the grid has both "
                "sides or none, and at least one position is needed"
            )

    @property
    def image(self) -> int:
        """Image positions."""
        return self.grid_h * self.grid_w

    @property
    def seq(self) -> int:
        """All positions."""
        return self.text + self.image
