"""Runs when the originals' interpreter starts: lets torchvision import beside a torch it was not compiled for.

Its Python part is all that the originals use; importing it fails unless the operators of its compiled part are known.
"""

import contextlib
import importlib.metadata


def _declare_operators() -> None:
    import torch

    compiled_for_cpu = "+cpu" in importlib.metadata.version("torchvision")
    if torch.version.cuda is not None or compiled_for_cpu:
        return  # the compiled part loads and brings its own
    library = torch.library.Library("torchvision", "FRAGMENT")
    boxes = "Tensor dets, Tensor scores, float iou_threshold"
    for name in ("nms", "qnms"):
        library.define(f"{name}({boxes}) -> Tensor")
    globals()["_library"] = library  # what it declares lives as long as it does


with contextlib.suppress(ImportError):  # while pip is still installing them
    _declare_operators()
