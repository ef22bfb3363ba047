"""Compiles attention's kernels for an H100 where there is none: TorchInductor and Triton are told what the device is.

`python tests/fake_cuda/sm90.py [CASE ...]` prints the kernels of cases, `--store` keeps them in `kernels.json`. Needs
triton, which brings its own assembler. Nothing is run: what is known afterwards is that a kernel can be had, and its
registers, shared memory and spills.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    import fake_device

    assert (WHY_NOT := fake_device.load()) is None, WHY_NOT

import torch

STORED = Path(__file__).with_name("kernels.json")
VERSION = ".".join(torch.__version__.split(".")[:2])
SHARED_LIMIT = 232448
"""Bytes of shared memory that a block may have on an H100 or H200."""
H100 = {
    **{"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32},
    **{"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024},
    **{"shared_memory_per_block_optin": SHARED_LIMIT, "shared_memory_per_multiprocessor": 233472},
    **{"L2_cache_size": 50 << 20, "total_memory": 80 << 30, "gcnArchName": "", "uuid": "none"},
}
CASES = [f"relative {dtype} {how}" for dtype in ("bfloat16", "float32") for how in ("trains", "evaluates")]
"""Attention with a bias for every offset. Patterns are left out: their block masks need real tensors."""


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

    from tokscale.nn.attention.relative import Places
    from tokscale.nn.attention.relative_flex import biased_attention

    _, dtype, how = case.split()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(how == "trains"):
        options: dict[str, Any] = {"device": "cuda", "requires_grad": how == "trains"}
        shapes = [(2, 4, length, 64) for length in (257, 258, 258)]
        q, k, v = (torch.empty(shape, dtype=getattr(torch, dtype), **options) for shape in shapes)
        table = torch.empty(Places(16, 16).rows, 4, **options)
        try:
            biased_attention(q, k, v, table, Places(16, 16))
        except RuntimeError as error:  # where the first kernel would be run
            assert "without support for the specified device" in str(error), error
    return [_resources(kernel) for kernel in kernels if "triton_tem" in kernel.metadata.name]


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


def why_not() -> str | None:
    """What is missing here, or None."""
    return None if find_spec("triton") else "triton is not installed"


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
