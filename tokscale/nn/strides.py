"""How weights lie in memory."""

import torch
from torch import nn

from tokscale.nn.head import VocabularyHead


def transpose_weights_for_decoding(module: nn.Module) -> None:
    """Store the weights of linear layers input by input, for decoding on a CPU, one position at a time.

    A product with one row reads such a weight in half the time, with two in two thirds of it, with more in the same
    (fp32, MKL, EPYC). Shapes and values stay as they are; only what is written to a file in this order must be made
    contiguous. Not for training: engines keep parameters in buffers of their own.

    Args:
        module: Whose weights are changed in place, as far as they are in single precision on a CPU.
    """
    for layer in module.modules():
        # A head that is an embedding too is also read entry by entry.
        if isinstance(layer, nn.Linear) or (isinstance(layer, VocabularyHead) and not layer.tied):
            weight = layer.weight
            if weight.device.type == "cpu" and weight.dtype is torch.float32:
                weight.data = weight.data.t().contiguous().t()
