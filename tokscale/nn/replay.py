"""Steps of fixed shapes, captured once as a CUDA graph and replayed: one launch in the place of hundreds."""

from collections.abc import Callable
from typing import Any

import torch

from tokscale.base.log import logger
from tokscale.base.protocols import ParameterAccess, current

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


class Replayed:
    """A function of tensors that is called again and again, captured for each of the shapes that it is given.

    What it reads beside its arguments must stay where it is in memory. A result lies where the next call with such
    shapes puts its own: use it before.

    Args:
        function: Of tensors, or None in their place, to a tensor, without a look at a result.
        device: Where. On anything but CUDA the function is simply called, as it is where parameters are sharded: they
            come to lie elsewhere in each call, and with them comes a collective.
    """

    def __init__(self, function: Callable[..., torch.Tensor], device: torch.device):
        self._function, self._device = function, device
        self._known: dict[Any, tuple[list[torch.Tensor | None], list[torch.Tensor], StepRunner]] = {}

    def __call__(self, *given: torch.Tensor | None) -> torch.Tensor:
        """The function's value."""
        if not StepRunner.wanted(self._device) or not current(ParameterAccess).whole:
            return self._function(*given)
        shapes = tuple(None if value is None else (value.shape, value.dtype) for value in given)
        if shapes not in self._known:
            self._known[shapes] = self._prepared(given)
        places, results, runner = self._known[shapes]
        for place, value in zip(places, given, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        runner.run(1, 1)
        return results[0]

    def _prepared(
        self, given: tuple[torch.Tensor | None, ...]
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor], StepRunner]:
        places = [None if value is None else torch.empty_like(value) for value in given]
        results: list[torch.Tensor] = []

        def step(reach: int) -> None:
            results[:] = [self._function(*places)]

        return places, results, StepRunner(step, self._device)
