"""Parameters, gradients and optimizer state: plain PyTorch, and DeepSpeed's ZeRO."""

from tokscale.engine import adafactor, adamw, lion, muon  # noqa: F401  # fills the registry before anyone asks it
