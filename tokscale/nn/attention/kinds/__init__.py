"""The attention kinds, one module each. To add one: a module here, and its name in the import below.

What a kind has to say is `AttentionKind` in `pattern.py`. The oracle tests take their cases from the registry.
"""

from tokscale.nn.attention.kinds import axial_col, axial_row, conv_like, full, sparse  # noqa: F401
