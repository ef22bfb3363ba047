"""One side of a side-by-side bench: a process that builds a case and calls it as often as it is told.

Started by `benches.beside`, in this interpreter or in that of the originals, so it needs torch alone. A line of JSON on
standard input is a request, a line on what was standard output its answer; what the program prints goes to standard
error.
"""

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from tokscale.bench.measure import matrix_share, one_thread, peak_bytes, seconds_of


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = _Side()
    with one_thread():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(side, request.pop("do"))(**request)
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


class MadeOn(TorchFunctionMode):
    """Inside, tensors are made on a device: what knows of none, ours or an original, computes there.

    What is drawn from a generator of the host is drawn there and moved, so that both sides see the same numbers.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func not in _device_constructors() or given.get("device") is not None:
            return func(*args, **given)
        if given.get("generator") is not None:
            return func(*args, **given).to(self._device)
        return func(*args, **given | {"device": self._device})


class _Side:
    """What can be asked of a side."""

    def __init__(self):
        self._call: Callable[[], object] = lambda: None

    def make(self, program: str, options: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
        """Build the case: `package.module:function` or `file.py:function`, called with the options."""
        self._call = lambda: None  # what the case before held is free before the next is made
        if device == "cpu":
            self._call = _function(program)(**options)
            return {}
        with MadeOn(torch.device(device)):
            made = _function(program)(**options)

        def call() -> object:
            with MadeOn(torch.device(device)):
                return made()

        self._call = call
        return {}

    def call(self, device: str) -> dict[str, Any]:
        """One call: its seconds, and what it returned where JSON can say it."""
        returned: list[object] = []
        taken = seconds_of(lambda: returned.append(self._call()), torch.device(device))
        return {"seconds": taken, "result": _plain(returned[0])}

    def peak(self, device: str) -> dict[str, Any]:
        """How far memory rises in a call; one that is not the first."""
        return {"bytes": peak_bytes(self._call, device, settle=False)}

    def share(self) -> dict[str, Any]:
        """Of a call's time, what matrix products take."""
        return {"share": matrix_share(self._call)}


def _function(program: str) -> Callable[..., Callable[[], object]]:
    place, _, name = program.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location(Path(place).stem + "_side", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _plain(value: object) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist() if value.numel() <= 64 else None
    return value if isinstance(value, int | float | str | list | dict) else None


if __name__ == "__main__":
    main()
