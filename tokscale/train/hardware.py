"""Peak arithmetic rates, so that a throughput can be read as a share of what the machine could do."""

import re

import torch

# Dense (not "with sparsity") vendor figures in TFLOP/s, from the data sheets of NVIDIA and AMD; first match wins.
# Consumer cards: with fp32 accumulation, as training uses it.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB300", {"bf16": 2500.0, "tf32": 1250.0, "fp32": 80.0}),
    ("B300", {"bf16": 2250.0, "tf32": 1125.0, "fp32": 75.0}),
    ("GB200", {"bf16": 2500.0, "tf32": 1250.0, "fp32": 80.0}),
    ("B200", {"bf16": 2250.0, "tf32": 1125.0, "fp32": 75.0}),
    ("GH200", {"bf16": 989.4, "tf32": 494.7, "fp32": 67.0}),
    ("H200", {"bf16": 989.4, "tf32": 494.7, "fp32": 67.0}),
    ("H100 PCIe", {"bf16": 756.0, "tf32": 378.0, "fp32": 51.0}),
    ("H100 NVL", {"bf16": 835.0, "tf32": 417.5, "fp32": 60.0}),
    ("H100", {"bf16": 989.4, "tf32": 494.7, "fp32": 67.0}),
    ("H800", {"bf16": 989.4, "tf32": 494.7, "fp32": 67.0}),
    ("A100", {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    ("A800", {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    ("A40", {"bf16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    ("A30", {"bf16": 165.0, "tf32": 82.0, "fp32": 10.3}),
    ("A10G", {"bf16": 70.0, "tf32": 35.0, "fp32": 31.5}),
    ("A10", {"bf16": 125.0, "tf32": 62.5, "fp32": 31.2}),
    ("L40S", {"bf16": 362.0, "tf32": 183.0, "fp32": 91.6}),
    ("L40", {"bf16": 181.0, "tf32": 90.5, "fp32": 90.5}),
    ("L4", {"bf16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    ("RTX 4090", {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    ("RTX 3090", {"bf16": 71.0, "tf32": 35.6, "fp32": 35.6}),
    ("V100", {"fp32": 15.7}),
    ("MI300X", {"bf16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
    ("MI250X", {"bf16": 383.0, "fp32": 95.7}),
)


def peak_flops(device_name: str, arithmetic: str) -> float | None:
    """Peak FLOP/s of a device in `bf16`, `tf32` or `fp32` arithmetic; None when it is not in the table."""
    for name, rates in _PEAKS:
        if re.search(rf"\b{name}\b", device_name):  # whole words: an "RTX A4000" is no A40
            rate = rates.get(arithmetic)
            return None if rate is None else rate * 1e12
    return None


def peak_flops_here(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of the device this process trains on. None for CPUs: their peak depends on clocks nobody fixes."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), arithmetic_here(device, dtype))


def arithmetic_here(device: torch.device, dtype: str) -> str:
    """The fastest arithmetic that products may use here for an engine's `dtype`: `bf16`, `tf32` or `fp32`.

    MFU is over the peak of this one.
    """
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if dtype == "fp32" and tf32 else dtype
