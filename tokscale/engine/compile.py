"""Compiled leaf regions of models (`nn/regions.py`): `engine.compile`."""

import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch

from tokscale.base.errors import EnvironmentRefused
from tokscale.base.log import logger
from tokscale.base.protocols import RegionCompiler
from tokscale.nn.regions import with_own_code

log = logger("engine")


class TorchCompiler(RegionCompiler):
    """Compiles each region by itself, without a break in its graph.

    A region is a function of its own for each set of options and is compiled anew for other shapes, in its second form
    for any size; beyond PyTorch's limit it is computed uncompiled, which is said once.

    Args:
        backend: Of `torch.compile`; tests count with another.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor"):
        self._backend = backend
        self._known: dict[Any, Callable[..., Any]] = {}

    def compiled(self, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
        """See `RegionCompiler`."""
        key = (function, *sorted(options.items()))
        if key not in self._known:
            self._known[key] = self._make(function, dict(options))
        return self._known[key]

    def _make(self, function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
        def region(*tensors: Any) -> Any:
            return function(*tensors, **options)

        compiled = torch.compile(with_own_code(region, function.__name__), fullgraph=True, backend=self._backend)
        # A model's backward pass may read what it saved twice: an adversarial task asks for two gradients of one loss.
        run = torch._functorch.config.patch(donated_buffer=False)(compiled)  # pyright: ignore
        known_as_slow = False

        def guarded(*tensors: Any) -> Any:
            nonlocal known_as_slow
            try:
                return run(*tensors)
            except torch._dynamo.exc.FailOnRecompileLimitHit:  # pyright: ignore[reportAttributeAccessIssue] - loaded by then
                if not known_as_slow:
                    log.warning(
                        "%s was compiled %d times for tensors of other sizes or types; for more it runs uncompiled",
                        function.__name__,
                        torch._dynamo.config.recompile_limit,
                    )
                known_as_slow = True
                return region(*tensors)

        return guarded


def region_compiler(compile: bool | Literal["auto"], device: torch.device) -> RegionCompiler:
    """What `engine.compile` asks for on a device.

    Raises:
        EnvironmentRefused: When regions are to be compiled, and there is nothing to compile them with.
    """
    wanted = device.type == "cuda" if compile == "auto" else compile
    if not wanted:
        return RegionCompiler()
    lacking = _lacking(device)
    if lacking is None:
        return TorchCompiler()
    if compile == "auto":
        log.info("engine.compile=auto: off, %s", lacking)
        return RegionCompiler()
    raise EnvironmentRefused(f"engine.compile=true: {lacking}; install it, or set engine.compile=false")


def _lacking(device: torch.device) -> str | None:
    if device.type == "cuda":
        return "there is no triton" if find_spec("triton") is None else None
    from torch._inductor import config  # brings the compiler: seconds to import

    compilers = [name for name in (config.cpp.cxx if isinstance(config.cpp.cxx, tuple) else (config.cpp.cxx,)) if name]
    return (
        None if any(map(shutil.which, compilers)) else f"there is no C++ compiler (looked for {', '.join(compilers)})"
    )
