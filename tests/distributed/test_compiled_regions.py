"""`engine.compile`: every model's leaf regions are compiled without a break, and train as they do uncompiled.

A backend that traces forward and backward but makes no machine code stands for the compiler; `--long` takes the real
one. The ranks have no shape checks, through which a compiler does not see.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from test_arithmetic_cross import BATCH, ENGINES, KINDS, batch_of, model_of

from tokscale.base import rng
from tokscale.dist.comm import Comm
from tokscale.dist.testing import run_ranks
from tokscale.engine import compile as engine_compile
from tokscale.engine.build import build_engine
from tokscale.engine.config import AdamWConfig, ScheduleConfig
from tokscale.models.maskgit import layers as maskgit_layers
from tokscale.models.maskgit import model as maskgit_model
from tokscale.models.registry import build_model
from tokscale.stages.train import seeded

STEPS = 20
CASES = [(kind, "eager", "fp32") for kind in KINDS]
CASES += [("dalle", "zero3", "fp32"), ("parti", "eager", "bf16")]
MORE = [("maskgit", "zero3", "bf16"), ("clip", "zero2", "bf16"), ("rqtransformer", "zero1", "bf16")]
REGIONS = {
    "clip": {"gated", "add_scaled"},
    "dalle": {"split_and_rotate", "norm_and_shift", "gated", "add_scaled", "score_chunk"},
    "hierarchical": {"score_chunk"},
    "maskgit": {"split_and_rotate", "gated", "gated_norm", "unit", "scaled_unit", "add_scaled", "score_chunk"},
    "parti": {"split_and_rotate", "gated", "gelu_norm", "add_scaled", "score_chunk"},
    "rqtransformer": {"split_and_rotate", "gated", "add_scaled", "score_chunk"},
}
"""What is compiled of each kind's model."""


def trained(comm: Comm, kind: str, engine: str, dtype: Any, compile: bool) -> list[float]:
    config = model_of(kind)
    # Parameters are whole while their module runs and at no other time.
    options = {} if engine == "eager" else {"stage": int(engine[-1]), "param_persistence_threshold": 0}
    built = build_engine(
        "model",
        seeded(lambda: build_model(config), 0, "model"),
        config=ENGINES[engine](dtype=dtype, compile=compile, **options),
        optimizer=AdamWConfig(lr=3e-3),
        schedule=ScheduleConfig(kind="constant"),
        comm=comm,
        micro_batches=1,
        micro_batch_size=BATCH,
        total_steps=STEPS,
    )
    batch, losses = batch_of(config), []
    for step in range(STEPS):
        with rng.scope(0, "cross"):
            loss = built(batch).total
            built.backward(loss)
        built.step(step)
        losses.append(loss.item())
    return losses


def compared(comm: Comm, cases: list[tuple[str, str, str]], backend: str) -> list[dict[str, Any]]:
    """Of each case the losses, uncompiled and compiled, and how often each region was compiled."""
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    for module in (maskgit_layers, maskgit_model):  # the fixed shapes that a GPU computes
        module.may_select = lambda x: False
    found = []
    seen: Counter[str] = Counter()

    class Counted(engine_compile.TorchCompiler):
        def compiled(self, function, options):
            def counting(graph, inputs):
                seen[function.__name__] += 1
                return lookup_backend(backend)(graph, inputs)

            self._backend = counting
            return super().compiled(function, options)

    engine_compile.TorchCompiler = Counted
    for case in cases:
        torch._dynamo.reset()
        counters.clear()
        seen.clear()
        plain, compiled = (trained(comm, *case, compile=compile) for compile in (False, True))
        breaks = sum(counters["graph_break"].values())
        found.append({"plain": plain, "compiled": compiled, "graphs": dict(seen), "breaks": breaks})
    return found


@pytest.mark.parametrize(
    ("backend", "world"), [("aot_eager", 1), pytest.param("inductor", 2, marks=pytest.mark.long)], ids=str
)
def test_compiled_regions_have_no_breaks_and_train_alike(backend: str, world: int) -> None:
    cases = CASES if world == 1 else CASES + MORE
    for case, found in zip(cases, run_ranks(compared, world, cases, backend, timeout=3000.0)[0], strict=True):
        kind, _, dtype = case
        assert found["breaks"] == 0, case
        assert set(found["graphs"]) == REGIONS[kind], case
        assert found["compiled"][-1] < found["compiled"][0], case
        assert found["compiled"] == pytest.approx(found["plain"], rel=1e-5 if dtype == "fp32" else 3e-2), case


def beyond_the_limit(comm: Comm) -> dict[str, Any]:
    """A region asked for in more types than may be compiled."""
    compiler = engine_compile.TorchCompiler("eager")
    messages: list[str] = []
    engine_compile.log.addFilter(lambda record: not messages.append(record.getMessage()))

    def twice(x: torch.Tensor, *, shift: int) -> torch.Tensor:
        return 2 * x + shift

    x = torch.ones(3)
    with torch._dynamo.config.patch(recompile_limit=1):
        run = compiler.compiled(twice, {"shift": 1})
        found = [run(x.to(dtype)).tolist() for dtype in (torch.float32, torch.float64, torch.int64, torch.float32)]
        other = compiler.compiled(twice, {"shift": 2})(x.double()).tolist()
    return {"found": found, "other": other, "messages": messages, "same": run is compiler.compiled(twice, {"shift": 1})}


def test_beyond_the_limit_a_region_runs_uncompiled_and_says_so_once() -> None:
    (told,) = run_ranks(beyond_the_limit, 1)
    assert told["found"] == [[3, 3, 3]] * 4 and told["other"] == [4, 4, 4] and told["same"]
    assert len(told["messages"]) == 1 and "twice was compiled 1 times" in told["messages"][0]
