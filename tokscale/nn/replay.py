"""Steps of fixed shapes, captured once as a CUDA graph and replayed: one launch in the place of hundreds."""

from collections.abc import Callable

import torch

from tokscale.base.log import logger

BUCKET = 256
"""Steps that share a graph: what one of them reads may grow from graph to graph."""
_log = logger("sampling")


class StepRunner:
    """Runs a step again and again.

    Args:
        step: A function of how far it may have to read (`reach`), which for one `reach` does the same operations on the
            same memory each time, without a look at a result. What changes lies in tensors that it updates in place.
        device: Where. On anything but CUDA the step is called each time.
    """

    def __init__(self, step: Callable[[int], None], device: torch.device):
        self._step = step
        self._captures = device.type == "cuda" and torch.cuda.is_available()
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    @staticmethod
    def wanted(device: torch.device) -> bool:
        """Whether steps of fixed shapes pay on a device: a CPU loses nothing by looking, and reads less."""
        return device.type == "cuda"

    def run(self, count: int, most: int) -> None:
        """Do one step.

        Args:
            count: Positions that it may have to read.
            most: Positions that there are at all.
        """
        reach = min(-(-count // BUCKET) * BUCKET, most)
        if not self._captures:
            self._step(reach)
        elif reach not in self._graphs:
            self._on_own_stream(reach)
            self._graphs[reach] = None
        elif (graph := self._graphs[reach] or self._capture(reach)) is not None:
            graph.replay()
        else:
            self._step(reach)

    def _on_own_stream(self, reach: int) -> None:
        """The first step of its kind, before it is captured: libraries make what they keep, tables are filled."""
        own = torch.cuda.Stream()
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            self._step(reach)
        torch.cuda.current_stream().wait_stream(own)

    def _capture(self, reach: int) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile: batches are fetched, a checkpoint is copied.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step(reach)
        except RuntimeError as error:
            self._captures = False
            _log.warning(
                "a step of drawing could not be captured as a CUDA graph, and runs launch by launch: %s", error
            )
            return None
        self._graphs[reach] = graph
        return graph
