import pytest
import torch

from tokscale.train.hardware import peak_flops, peak_flops_here


@pytest.mark.parametrize(
    ("device", "arithmetic", "tera"),
    [
        ("NVIDIA B300 SXM6 AC", "bf16", 2250.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("NVIDIA GH200 480GB", "tf32", 494.7),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
    ],
)
def test_known_devices(device, arithmetic, tera):
    assert peak_flops(device, arithmetic) == tera * 1e12


@pytest.mark.parametrize("device", ["NVIDIA RTX A4000", "Some Accelerator 9000", ""])
def test_unknown_devices_have_no_peak(device):
    assert peak_flops(device, "bf16") is None


def test_a_rate_the_device_lacks_is_unknown():
    assert peak_flops("Tesla V100-SXM2-32GB", "bf16") is None


def test_a_cpu_has_no_peak():
    assert peak_flops_here(torch.device("cpu"), "fp32") is None
