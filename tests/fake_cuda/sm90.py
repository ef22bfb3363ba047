"""Compiles attention's kernels for an H100 where there is none: TorchInductor and Triton are told what the device is.

`python tests/fake_cuda/sm90.py [CASE ...]` prints the kernels of cases, `--store` keeps them in `kernels.json`. Needs
triton, which brings its own assembler. Nothing is run: what is known afterwards is that a kernel can be had, and its
registers, shared memory and spills.
"""

import copy
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

if __name__ == "__main__":
    import fake_device

    assert (WHY_NOT := fake_device.load()) is None, WHY_NOT

import torch

STORED = Path(__file__).with_name("kernels.json")
VERSION = "torch " + ".".join(torch.__version__.split(".")[:2])
if find_spec("triton"):
    VERSION += ", triton " + ".".join(metadata.version("triton").split(".")[:2])
SHARED_LIMIT = 232448
"""Bytes of shared memory that a block may have on an H100 or H200."""
H100 = {
    **{"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32},
    **{"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024},
    **{"shared_memory_per_block_optin": SHARED_LIMIT, "shared_memory_per_multiprocessor": 233472},
    **{"L2_cache_size": 50 << 20, "total_memory": 80 << 30, "gcnArchName": "", "uuid": "none"},
}
HOWS = ("trains", "evaluates")
WHAT = ("relative", "full", "axial_row", "axial_col", "conv_like", "sparse", "regions")
"""Attention with a bias for every offset, the kinds of `attn_types`, and all leaf regions of all models."""
CASES = [f"{what} {dtype} {how}" for what in WHAT for dtype in ("bfloat16", "float32") for how in HOWS]


class _Driver:
    """What Triton asks a device."""

    binary_ext = "cubin"

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _state_the_device(kernels: list[Any]) -> None:
    """Put an H100's answers in the place of CUDA's, and keep every kernel that Triton compiles."""
    import torch._functorch.config
    import torch._inductor.config
    import torch._inductor.fx_passes.joint_graph
    import torch._inductor.runtime.triton_helpers
    import torch.utils._triton
    import triton
    from torch._inductor.runtime import triton_heuristics
    from triton.runtime.driver import driver

    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: SimpleNamespace(**H100)
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.device_count, cuda.current_device, cuda.is_available = lambda: 1, lambda: 0, lambda: True
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8, device="cpu")
    cuda.set_rng_state = cuda.synchronize = cuda._lazy_init = lambda *args, **options: None
    cuda._exchange_device = lambda device: 0
    cuda._maybe_exchange_device = lambda device: 0  # another function: dynamo keeps a table of them
    cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    native: Any = torch._C
    native._cuda_getCurrentRawStream = lambda device=0: 0
    native._cuda_getDevice = lambda: 0
    native._cuda_setDevice = lambda device: None
    native._cuda_exchangeDevice = cuda._exchange_device
    native._cuda_maybeExchangeDevice = cuda._maybe_exchange_device
    torch.cuda._get_device_properties = lambda device: SimpleNamespace(**H100)  # type: ignore[attr-defined]
    torch.version.cuda = "13.0"
    torch.utils._triton.has_triton = torch.utils._triton.has_triton_package = lambda: True
    driver.set_active(_Driver())

    torch._inductor.config.compile_threads, torch._inductor.config.fx_graph_cache = 1, False
    torch._inductor.config.joint_graph_constant_folding = False  # it would compute constants on the device
    torch._functorch.config.force_non_lazy_backward_lowering = True
    # It would look for patterns on tensors of its own, on the device.
    torch._inductor.fx_passes.joint_graph.lazy_init = lambda *args, **options: None
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    triton_heuristics.CachingAutotuner._make_launchers = lambda self: None
    real = triton.compile

    def keep(src: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
        kernels.append(real(src, target=target or _Driver().get_current_target(), options=options))
        return kernels[-1]

    triton.compile = triton_heuristics.triton.compile = keep


def compile_case(case: str) -> list[dict[str, Any]]:
    """The attention kernels of one case; for this process alone, which sees an H100 from then on."""
    kernels: list[Any] = []
    _state_the_device(kernels)
    from torch._subclasses.fake_tensor import FakeTensorMode

    what, dtype, how = case.split()
    torch.set_float32_matmul_precision("high")  # TF32, as engines have it unless told otherwise
    mode, trains = FakeTensorMode(allow_non_fake_inputs=True), how == "trains"
    if what == "regions":
        with torch.set_grad_enabled(trains):
            _compile_regions(getattr(torch, dtype), mode)
        return _most([_resources(kernel) for kernel in kernels])
    attend, length = _biased() if what == "relative" else _of_pattern(what)
    with mode, torch.set_grad_enabled(trains):
        options: dict[str, Any] = {"device": "cuda", "requires_grad": trains}
        lengths = (length, length + 1, length + 1) if what == "relative" else (length,) * 3
        q, k, v = (torch.empty((2, 4, count, 64), dtype=getattr(torch, dtype), **options) for count in lengths)
        _until_it_runs(lambda: attend(q, k, v, options))
    return [_resources(kernel) for kernel in kernels if "triton_tem" in kernel.metadata.name]


def _until_it_runs(call: Callable[[], object]) -> None:
    """What is called is compiled, forward and backward, before its first kernel would be run."""
    try:
        call()
    except RuntimeError as error:
        assert "without support for the specified device" in str(error), error


def _compile_regions(dtype: torch.dtype, mode: Any) -> None:
    """Every region that a step of any model asks for, once for each kind of tensors."""
    import model_cases
    from ledger import Ledger, to_cuda

    from tokscale.base.protocols import RegionCompiler, using
    from tokscale.engine.compile import TorchCompiler
    from tokscale.models.registry import build_model

    asked: dict[Any, tuple[Callable[..., Any], Mapping[str, Any], list[Any]]] = {}

    class Seen(RegionCompiler):
        def compiled(self, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
            def run(*tensors: Any) -> Any:
                kinds = [(t.dtype, t.ndim, t.shape[-1:], t.requires_grad) if t is not None else None for t in tensors]
                asked.setdefault((function, str(options), str(kinds)), (function, options, list(tensors)))
                return function(*tensors, **options)

            return run

    # Without FlexAttention, which the other cases compile.
    options = {"dalle": {"attn_backend": "sdpa"}, "maskgit": {}, "parti": {"rel_pos_bias": False, "multi_query": False}}
    for kind, others in ({**options, "rqtransformer": {}}).items():
        config = model_cases.base(kind, dim=1024, dim_head=64, heads=16, **others)
        model = build_model(config).train()
        with mode, using(Seen()), Ledger():  # which answers where a model asks for a value
            to_cuda(model, dtype)(model_cases.tokens(config))
    for function, options, tensors in asked.values():
        with mode:
            leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
            _until_it_runs(lambda: TorchCompiler().compiled(function, options)(*leaves))  # noqa: B023 - called at once


def _biased() -> tuple[Callable[..., object], int]:
    from tokscale.nn.attention.relative import Places
    from tokscale.nn.attention.relative_flex import biased_attention

    def attend(q: Any, k: Any, v: Any, options: dict[str, Any]) -> object:
        return biased_attention(q, k, v, torch.empty(Places(16, 16).rows, 4, **options), Places(16, 16))

    return attend, 257


def _of_pattern(kind: str) -> tuple[Callable[..., object], int]:
    """A kind over 256 words and 32 x 32 codes. Which blocks live is found on the CPU, where tensors hold numbers."""
    from tokscale.nn.attention import flex
    from tokscale.nn.attention.pattern import AttentionPattern
    from tokscale.nn.layout import TokenLayout

    pattern = AttentionPattern(kind, TokenLayout(256, 32, 32), heads=4)
    plan = flex._plan(pattern, pattern.layout.seq, "cpu")
    order = flex.token_order(pattern, pattern.layout.seq)

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    def attend(q: Any, k: Any, v: Any, options: dict[str, Any]) -> object:
        mask = copy.copy(plan.mask)
        for name, value in vars(plan.mask).items():
            if isinstance(value, torch.Tensor):
                setattr(mask, name, there(value))
        mask.mask_mod = flex.mask_function(pattern, there(order))
        places = [None if where is None else there(where) for where in (plan.places, plan.slots)]
        with mock.patch.object(flex, "_plan", lambda *asked: flex._Plan(mask, *places)):
            return flex.block_attention(q, k, v, pattern)

    return attend, pattern.layout.seq


def _resources(kernel: Any) -> dict[str, Any]:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
    return {
        "kernel": re.sub(r"\d+$", "", kernel.metadata.name).rstrip("_"),
        "registers": found["REG"],
        "shared": kernel.metadata.shared,
        "spilled": found["STACK"] + found["LOCAL"],
    }


def _most(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each kernel once, with the most that any of its launch configurations takes; which is run, a GPU decides."""
    most: dict[str, dict[str, Any]] = {}
    for kernel in found:
        known = most.setdefault(kernel["kernel"], kernel)
        most[kernel["kernel"]] = known | {what: max(known[what], kernel[what]) for what in kernel if what != "kernel"}
    return list(most.values())


def why_not(kept: object) -> str | None:
    """What is missing here, or None."""
    if not find_spec("triton"):
        return "triton is not installed"
    return None if kept else f"nothing is stored for {VERSION}: python tests/fake_cuda/sm90.py --store"


if __name__ == "__main__":
    asked = [argument for argument in sys.argv[1:] if argument != "--store"] or CASES
    if len(asked) == 1 and "--store" not in sys.argv:
        print(json.dumps(compile_case(asked[0])))
    else:
        known = json.loads(STORED.read_text()) if STORED.exists() else {}
        for name in asked:  # each in a process of its own
            told = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True).stdout
            known.setdefault(VERSION, {})[name] = json.loads(told.splitlines()[-1])
            print(name, known[VERSION][name], flush=True)
            if "--store" in sys.argv:
                STORED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
