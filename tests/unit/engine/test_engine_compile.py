"""What `engine.compile` asks for, by device and by what is installed."""

import pytest
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, EnvironmentRefused
from tokscale.engine import compile as engine_compile
from tokscale.engine.compile import TorchCompiler, region_compiler
from tokscale.engine.config import EagerConfig, ZeroConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.setattr(engine_compile, "_lacking", lambda device: None)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("asked", "device", "compiles"),
    [("auto", CPU, False), ("auto", CUDA, True), (True, CPU, True), (True, CUDA, True), (False, CUDA, False)],
)
def test_auto_compiles_on_cuda(asked, device, compiles):
    assert isinstance(region_compiler(asked, device), TorchCompiler) == compiles


def test_without_a_compiler_auto_is_off_and_true_is_refused(monkeypatch):
    monkeypatch.setattr(engine_compile, "find_spec", lambda name: None)
    assert not isinstance(region_compiler("auto", CUDA), TorchCompiler)
    with pytest.raises(EnvironmentRefused, match=r"engine\.compile=true: there is no triton.*engine\.compile=false"):
        region_compiler(True, CUDA)


@pytest.mark.parametrize("config", [EagerConfig, ZeroConfig])
def test_every_engine_has_the_key(config):
    assert config().compile == "auto"
    assert decode(config, {"compile": False}).compile is False
    with pytest.raises(ConfigError, match="compile"):
        decode(config, {"compile": "sometimes"})
