"""Every model with every option in every arithmetic of the engines, on a CUDA device that is not there.

Fails on a tensor on another device, on operands of different types at one kernel, and where the host waits for the
device or copies to it in a place that `allowed.py` does not name.
"""

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from allowed import check
from ledger import Ledger, forget_tables, to_cuda
from model_cases import LEARNT_FOR, REFUSED, Case, base, cases, draw, sampling_cases, soft, tokens

from tokscale.base.batch import TokenBatch
from tokscale.base.errors import ConfigError
from tokscale.models.registry import build_model

pytestmark = pytest.mark.usefixtures("cuda")

ARITHMETICS = ("fp32", "autocast", "bf16")
"""What engines compute in: `autocast` is bf16 over weights in single precision, `bf16` has weights of its own type."""
CROSS = [(case, how) for case in cases() for how in ARITHMETICS if how != "fp32" or case.name == "base"]
"""All pairs but those of an option in single precision, where no two types can meet."""


def built(case: Case, arithmetic: str) -> Any:
    forget_tables()
    return to_cuda(build_model(case.config), torch.bfloat16 if arithmetic == "bf16" else None)


def as_engine(arithmetic: str) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if arithmetic == "autocast" else nullcontext()


@pytest.mark.parametrize(("case", "arithmetic"), CROSS, ids=[f"{case.kind}-{case.name}-{how}" for case, how in CROSS])
def test_a_model_trains_evaluates_and_draws(case: Case, arithmetic: str) -> None:
    if case.name in REFUSED:
        with pytest.raises(ConfigError):
            built(case, arithmetic).train()(tokens(case.config))
        return
    model = built(case, arithmetic)
    with Ledger() as ledger:
        _train(model, case, arithmetic)
    check(ledger, "train")
    if arithmetic == "autocast" and case.name != "base":
        return  # what follows differs by the types of weights, not by the engine
    with Ledger() as ledger, torch.no_grad(), as_engine(arithmetic):
        model.eval()(tokens(case.config))
    check(ledger, "held-out loss")
    if arithmetic == "bf16" or (arithmetic == "fp32" and case.name == "base"):  # an export has weights of its own type
        with Ledger() as ledger:
            assert all(out.device.type == "cuda" for _, out in draw(model, case.config))
        check(ledger, "sample")


def _train(model: Any, case: Case, arithmetic: str) -> None:
    batch = tokens(case.config)
    with as_engine(arithmetic):
        loss = model.train()(batch).total
    loss.backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking, f"no gradient: {lacking}"
    if isinstance(batch, TokenBatch) and (chances := soft(case.config)):
        with as_engine(arithmetic):
            loss = model(dataclasses.replace(batch, extra={**batch.extra, **chances})).total
        loss.backward()


@pytest.mark.parametrize(("kind", "options"), list(sampling_cases()), ids=str)
def test_a_model_draws_with_every_option(kind: str, options: dict[str, Any]) -> None:
    learnt = {key: value for name in options for key, value in LEARNT_FOR.get(name, {}).items()}
    case = Case(kind, "base", base(kind, **learnt))
    model = built(case, "bf16").eval()
    with Ledger() as ledger:
        assert all(out.device.type == "cuda" for _, out in draw(model, case.config, options))
    check(ledger, "sample")
