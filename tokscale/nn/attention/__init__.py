"""Attention: one boolean definition per kind, and many ways to compute it."""

from tokscale.nn.attention import kinds  # noqa: F401  # fills the registry before anyone asks it
