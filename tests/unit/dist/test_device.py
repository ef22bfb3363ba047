"""Which device is taken: never the CPU in silence where GPUs were given."""

import pytest
import torch

from tokscale.base.errors import ConfigError, EnvironmentRefused
from tokscale.dist import device
from tokscale.dist.device import choose_device, choose_dtype, gpus_given


@pytest.fixture
def machine(monkeypatch):
    """Sets how many GPUs torch sees, and what the variables and `nvidia-smi` say."""

    def make(gpus: int, smi: str = "", **variables: str) -> None:
        for name in (*device._GIVEN, "DS_ACCELERATOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(device, "_nvidia_smi", lambda *words: smi)

    return make


def test_without_gpus_auto_is_the_cpu(machine):
    machine(0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "given",
    [{"SLURM_JOB_GPUS": "0,1"}, {"SLURM_STEP_GPUS": "3"}, {"SLURM_GPUS_ON_NODE": "8"}, {"CUDA_VISIBLE_DEVICES": "0"}],
)
def test_gpus_that_torch_does_not_see_are_an_error_that_names_them(machine, given):
    machine(0, **given)
    ((name, value),) = given.items()
    with pytest.raises(EnvironmentRefused, match=f"{name}={value}.*wheel.*device=cpu") as refused:
        choose_device("auto")
    assert refused.value.exit_code == 69
    assert choose_device("cpu").type == "cpu"


def test_gpus_that_only_the_driver_lists_are_given_too(machine):
    machine(0, smi="GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\n")
    with pytest.raises(EnvironmentRefused, match="nvidia-smi lists 2"):
        choose_device("auto")


@pytest.mark.parametrize("variables", [{"CUDA_VISIBLE_DEVICES": ""}, {"SLURM_GPUS_ON_NODE": "0"}])
def test_gpus_that_are_hidden_were_not_given(machine, variables):
    machine(0, **variables)
    assert gpus_given() is None and choose_device("auto").type == "cpu"


def test_the_wheel_for_another_driver_is_named(machine, monkeypatch):
    machine(0, smi="535.1\n", SLURM_JOB_GPUS="0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(EnvironmentRefused, match=r"CUDA 13.0.*driver here is 535.1"):
        choose_device("auto")


def test_a_task_that_sees_one_gpu_uses_it_whatever_its_local_rank(machine):
    machine(1)
    assert choose_device("auto", local_rank=5) == torch.device("cuda", 0)
    machine(8)
    assert choose_device("cuda", local_rank=5) == torch.device("cuda", 5)
    assert choose_device("cuda:3", local_rank=5) == torch.device("cuda", 3)
    with pytest.raises(EnvironmentRefused, match="local rank 9.*8 GPU"):
        choose_device("auto", local_rank=9)


def test_a_device_that_is_not_there_is_refused(machine):
    machine(0)
    with pytest.raises(EnvironmentRefused, match="device=cuda"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="tpu9"):
        choose_device("tpu9")
    machine(2)
    with pytest.raises(EnvironmentRefused, match="device=cuda:2"):
        choose_device("cuda:2")


def test_deepspeeds_own_word_for_the_cpu_is_heard(machine):
    machine(2, DS_ACCELERATOR="cpu")
    assert choose_device("auto").type == "cpu"


def test_weights_are_bf16_on_a_gpu_alone_unless_asked_for(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype("auto", cpu) is None and choose_dtype("auto", cuda) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype("auto", cuda) is None
    assert choose_dtype("fp32", cuda) is torch.float32 and choose_dtype("bf16", cpu) is torch.bfloat16
