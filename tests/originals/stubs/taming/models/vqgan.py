"""The two names that `dalle_pytorch.vae` imports at start-up."""

from torch import nn


class VQModel(nn.Module):
    """Never instantiated."""


class GumbelVQ(VQModel):
    """Never instantiated."""
