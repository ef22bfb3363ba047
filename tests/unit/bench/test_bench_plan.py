"""`bench plan` beside tensors that are really there."""

import pytest
import torch

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.bench import plan
from tokscale.bench.plan import PlanBench
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.engine.build import build_engine
from tokscale.engine.config import EagerConfig, ScheduleConfig
from tokscale.models.registry import build_model

SIZES = {"codes": 50, "code_shape": (8, 8), "words": 40, "micro_batch_size": 4, "dtype": "fp32"}
STACK = {"dim": 64, "depth": 3, "heads": 4, "dim_head": 16}
CAPTION = {"kind": "caption", "depth": 2, "heads": 4, "dim_head": 16}
MODELS = {
    "parti": STACK | {"kind": "parti", "max_text_len": 16, "condition": CAPTION},
    "parti_paper": STACK
    | {"kind": "parti", "max_text_len": 16, "condition": CAPTION, "rel_pos_bias": False, "multi_query": False},
    "dalle": STACK | {"kind": "dalle", "text_seq_len": 16, "attn_types": ["full"]},
}
OPTIMIZERS = {
    "adamw": {"kind": "adamw"},
    "lion": {"kind": "lion"},
    "muon": {"kind": "muon"},
    "adafactor": {"kind": "adafactor", "min_factor": 32},
}


def planned(model: str, **options: object) -> PlanBench:
    return decode(PlanBench, SIZES | {"model": MODELS[model]} | options)


@pytest.mark.parametrize("choice", ["none", "block"])
@pytest.mark.parametrize("model", MODELS)
def test_activations_are_those_that_a_run_keeps(model, choice):
    config = planned(model)
    fitted = plan.with_remat(plan.fit(config), choice)
    with rng.scope(0, "model"):
        real = build_model(fitted).train()
    some = plan.example(fitted, config)
    text, codes = (torch.ones(tensor.shape, dtype=torch.long) for tensor in (some.text, some.codes))
    wanted = plan.saved_bytes(real, TokenBatch(torch.arange(4), text, text > 0, codes))
    assert plan._saved(fitted, config) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_is_that_of_an_engine(optim):
    config = planned("parti", optim=optim)
    fitted = plan.fit(config)
    engine = build_engine(
        "model",
        lambda: build_model(fitted),
        config=EagerConfig(),
        optimizer=config.optim,
        schedule=ScheduleConfig(kind="constant"),
        comm=Comm(ProcessEnv()),
        micro_batches=1,
        micro_batch_size=4,
        total_steps=1,
    )
    held: dict[str, float] = {}
    for shard in engine.shards():
        held[shard.slot] = held.get(shard.slot, 0) + shard.data.numel() * shard.data.element_size()
    counted = plan.state_bytes(engine.model, config, 1)
    assert counted["master"] == held.pop("weight")
    assert counted["moments"] == pytest.approx(sum(held.values()), rel=0.1)


def test_everything_is_divided_but_what_is_whole_on_each_rank():
    config = planned("parti", optim={"kind": "adafactor", "min_factor": 32})
    with torch.device("meta"):
        model = build_model(plan.fit(config))
    one, eight = (plan.state_bytes(model, config, ranks) for ranks in (1, 8))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert one["master"] == 4 * weights == 8 * eight["master"] == 8 * eight["gradients"]
    assert eight["parameters"] == 4 * (weights / 8 + weights), "all of them are below the threshold here"
    assert eight["moments"] > one["moments"] / 8


def test_recomputation_keeps_less_and_rows_add_up():
    config = planned("parti", nodes=[1, 2])
    found = {entry["name"]: entry for entry in plan.rows(config)}
    need = {
        name.removeprefix("plan/parti/2x8/fp32/"): entry["ours"] for name, entry in found.items() if "/2x8/" in name
    }
    state = sum(need[part] for part in ("parameters", "gradients", "master", "moments", "buckets"))
    assert need["total-remat-none"] == pytest.approx(state + need["activations-remat-none"])
    assert need["activations-remat-block"] < 0.6 * need["activations-remat-none"]
    assert found["plan/parti/1x8/fp32/master"]["ours"] == pytest.approx(2 * need["master"])


def test_a_model_of_images_is_refused():
    with pytest.raises(ConfigError, match=r"model\.kind=clip"):
        plan.fit(decode(PlanBench, SIZES | {"model": {"kind": "clip"}}))


def test_state_is_divided_over_ranks_but_for_what_each_keeps_whole():
    config = planned("parti")
    with torch.device("meta"):
        model = build_model(plan.fit(config))
    one, eight = (plan.state_bytes(model, config, ranks) for ranks in (1, 8))
    for part in ("gradients", "master", "moments"):
        assert eight[part] == one[part] / 8  # AdamW keeps nothing whole
    assert one["parameters"] / 8 < eight["parameters"] < one["parameters"] and eight["buckets"] == one["buckets"]
