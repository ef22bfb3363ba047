"""A run chooses its arithmetic once, and goes on in it wherever it is taken."""

from typing import Any

import pytest
import tiny_pipeline
import torch

from tokscale.base.config import decode
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine import build
from tokscale.engine.config import EagerConfig
from tokscale.runs.arithmetic import arithmetic, in_recorded_arithmetic, keep_dtype, recorded_dtype
from tokscale.stages.train import TrainConfig
from tokscale.stages.train_tokenizer import TrainTokenizerConfig

ALONE = Comm(ProcessEnv(), device=torch.device("cpu"))


def native(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    monkeypatch.setattr(build, "computes_bf16", lambda device: told)


@pytest.mark.parametrize("first", [True, False])
def test_auto_is_chosen_once_and_kept_on_another_machine(tmp_path, monkeypatch, first):
    native(monkeypatch, first)
    begun = in_recorded_arithmetic(tmp_path, EagerConfig(dtype="auto"), ALONE)
    native(monkeypatch, not first)
    again = in_recorded_arithmetic(tmp_path, EagerConfig(dtype="auto"), ALONE)
    assert begun.dtype == again.dtype == recorded_dtype(tmp_path) == ("bf16" if first else "fp32")


def test_a_run_that_named_its_arithmetic_goes_on_in_it_when_asked_for_auto(tmp_path, monkeypatch):
    native(monkeypatch, True)
    keep_dtype(tmp_path, {"engine": {"kind": "eager", "dtype": "fp32"}})
    assert in_recorded_arithmetic(tmp_path, EagerConfig(dtype="auto"), ALONE).dtype == "fp32"


@pytest.mark.parametrize("kind", [TrainConfig, TrainTokenizerConfig])
@pytest.mark.parametrize("engine", [None, {"kind": "zero", "stage": 2}, {"kind": "eager"}])
def test_stages_that_train_ask_for_auto(kind: Any, engine):
    needed = {"tokenizer": {"kind": "dvae"}} if kind is TrainTokenizerConfig else {"model": tiny_pipeline.MODEL}
    asked = {} if engine is None else {"engine": engine}
    assert decode(kind, needed | asked).engine.dtype == "auto"
    assert decode(kind, needed | {"engine": {"kind": "zero", "dtype": "fp32"}}).engine.dtype == "fp32"


def test_determinism_is_asked_of_torch_and_taken_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    with arithmetic(torch.device("cuda"), tf32=True, deterministic=False):
        assert torch.get_float32_matmul_precision() == "high" and not torch.are_deterministic_algorithms_enabled()
    with arithmetic(torch.device("cuda"), tf32=True, deterministic=True):
        assert torch.get_float32_matmul_precision() == "highest" and torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
    with arithmetic(torch.device("cuda"), tf32=False, deterministic=False):
        assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == before
