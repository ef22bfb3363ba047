"""`bench plan` beside tensors that are really there."""

import pytest
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.bench import memory, plan
from tokscale.bench.live import LiveBytes
from tokscale.bench.plan import PlanBench
from tokscale.bench.plan_machine import with_machine
from tokscale.bench.stepping import Stepper, filled
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.testing import run_ranks
from tokscale.engine.build import build_engine
from tokscale.engine.config import EagerConfig, ScheduleConfig, ZeroConfig
from tokscale.engine.groups import freeze
from tokscale.models.registry import build_model

SIZES = {"codes": 50, "code_shape": (8, 8), "words": 40, "micro_batch_size": 4, "dtype": "fp32"}
STACK = {"dim": 64, "depth": 3, "heads": 4, "dim_head": 16}
CAPTION = {"kind": "caption", "depth": 2, "heads": 4, "dim_head": 16}
MODELS = {
    "parti": STACK | {"kind": "parti", "max_text_len": 16, "condition": CAPTION},
    "parti_paper": STACK
    | {"kind": "parti", "max_text_len": 16, "condition": CAPTION, "rel_pos_bias": False, "multi_query": False},
    "dalle": STACK | {"kind": "dalle", "text_seq_len": 16, "attn_types": ["full"], "dim": 192, "dim_head": 48},
    "maskgit": STACK | {"kind": "maskgit", "condition": CAPTION | {"depth": 1}},
}
OPTIMIZERS = {
    "adamw": {"kind": "adamw"},
    "lion": {"kind": "lion"},
    "muon": {"kind": "muon"},
    "adafactor": {"kind": "adafactor", "min_factor": 32},
}


def planned(model: str, **options: object) -> PlanBench:
    return decode(PlanBench, SIZES | {"model": MODELS[model]} | options)


def peaks(comm: Comm, cases: list[tuple[str, str, str]]) -> list[tuple[float, float]]:
    """Bytes that live tensors hold at most in a real step under ZeRO-3, and what the plan says, in each case."""
    torch.set_num_threads(1)
    found = []
    for name, dtype, remat in cases:
        config = planned(name, dtype=dtype, ema=1)
        model = plan.with_remat(plan.fit(config), remat)
        with LiveBytes() as live:
            batch = filled(plan.example(model, config), comm.device, codes=config.codes, words=config.words)
            engine = ZeroConfig(dtype=dtype, ema=(0.9,))
            step = Stepper(model, engine, config.optim, comm, batch)
            for _ in range(3):
                live.restart()
                step()
        with torch.device("meta"):
            meta = build_model(model)
        need = plan.step_need(model, config, remat)
        state = memory.state_bytes(meta, config.optim, dtype, comm.world, ema=1)
        found.append(
            (live.peak, sum(state.values()) + max(need) + memory.gathered_bytes(meta, dtype, comm.world, need))
        )
        del step, batch
    return found


CASES = [("dalle", "bf16", "block"), ("parti", "fp32", "none"), ("maskgit", "fp32", "block"), ("dalle", "fp32", "none")]


@pytest.mark.parametrize(("world", "cases"), [(1, CASES), (2, CASES[-1:])])
def test_memory_is_within_5_percent_of_the_peak_of_live_tensors_in_a_real_step(world, cases):
    for case, (held, said) in zip(cases, run_ranks(peaks, world, cases)[0], strict=True):
        assert said == pytest.approx(held, rel=0.05), case


@pytest.mark.long
def test_memory_is_that_of_four_ranks_too():
    ((held, said),) = run_ranks(peaks, 4, CASES[-1:])[0]
    assert said == pytest.approx(held, rel=0.05)


def test_live_bytes_are_counted_once_and_until_nobody_holds_them():
    given = torch.ones(10)
    with LiveBytes([given]) as live:
        whole = torch.ones(1000)
        part = whole[:10].clone()
        view = whole.view(10, 100)
        assert given.view(2, 5).shape == (2, 5) and live.now == 4040
        del whole
        assert live.now == 4040
        del view
    assert live.now == 40 == part.numel() * 4 and live.peak == 4040


@pytest.mark.parametrize("frozen", [[], ["*encoder*"]], ids=["all", "frozen"])
@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_is_that_of_an_engine(optim, frozen):
    scales = {"lr_scales": {"decoder.*": 0.1}} if frozen else {}
    config = planned("parti", optim={**optim, **scales}, freeze=frozen)
    fitted = plan.fit(config)
    engine = build_engine(
        "model",
        lambda: freeze(build_model(fitted), frozen),
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
    counted = memory.state_bytes(engine.model, config.optim, "fp32", 1)
    assert bool(frozen) == (held.pop("frozen", 0) > 0)
    assert counted["master"] == counted["gradients"] == held.pop("weight")
    assert counted["moments"] == pytest.approx(sum(held.values()), rel=0.1)


def test_everything_is_divided_but_what_is_whole_on_each_rank():
    config = planned("parti", optim={"kind": "adafactor", "min_factor": 32})
    with torch.device("meta"):
        model = build_model(plan.fit(config))
    one, eight = (memory.state_bytes(model, config.optim, "fp32", ranks) for ranks in (1, 8))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert one["master"] == 4 * weights == 8 * eight["master"] == 8 * eight["gradients"]
    assert eight["parameters"] == 4 * (weights / 8 + weights), "all of them are below the threshold here"
    assert eight["moments"] > one["moments"] / 8


def test_several_shapes_of_images_take_what_the_one_with_the_most_codes_takes():
    alone = planned("maskgit")
    several = plan.costliest(planned("maskgit", grids=[(4, 10), (8, 8)]))
    plan.step_need(plan.fit(alone), alone, "none")  # tables that are made once
    one, more = (plan.step_need(plan.fit(config), config, "none") for config in (alone, several))
    assert several.code_shape == (8, 8) and more == one
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in build_model(plan.fit(config)).parameters()) for config in (alone, several)]
    # A table of positions for the most rows and the most columns.
    assert sizes[1] - sizes[0] == (8 * 10 - 8 * 8) * STACK["dim"]


def test_recomputation_keeps_less_and_rows_add_up():
    config = planned("parti", nodes=[1, 2])
    found = {entry["name"]: entry for entry in plan.rows(config)}
    need = {
        name.removeprefix("plan/parti/2x8/fp32/"): entry["ours"] for name, entry in found.items() if "/2x8/" in name
    }
    state = sum(need[part] for part in ("parameters", "gradients", "master", "moments", "buckets"))
    beside = need["activations-remat-none"] + need["gathered-remat-none"]
    assert need["total-remat-none"] == pytest.approx(state + beside) and "averages" not in need
    assert need["activations-remat-block"] < 0.6 * need["activations-remat-none"]
    assert found["plan/parti/1x8/fp32/master"]["ours"] == pytest.approx(2 * need["master"])


def test_patterns_that_match_nothing_are_refused_and_frozen_parts_need_less():
    frozen = {entry["name"]: entry["ours"] for entry in plan.rows(planned("parti", nodes=[1], freeze=["*encoder*"]))}
    whole = {entry["name"]: entry["ours"] for entry in plan.rows(planned("parti", nodes=[1]))}
    for part in ("master", "moments", "gradients", "total-remat-none"):
        assert frozen[f"plan/parti/1x8/fp32/{part}"] < whole[f"plan/parti/1x8/fp32/{part}"]
    for options in ({"freeze": ["nothing*"]}, {"optim": {"kind": "adamw", "lr_scales": {"nothing*": 2}}}):
        with pytest.raises(ConfigError, match=r"'nothing\*' matches no parameter"):
            list(plan.rows(planned("parti", nodes=[1], **options)))


def test_a_model_of_images_is_refused():
    with pytest.raises(ConfigError, match=r"model\.kind=clip"):
        plan.fit(decode(PlanBench, SIZES | {"model": {"kind": "clip"}}))


def test_state_is_divided_over_ranks_but_for_what_each_keeps_whole():
    config = planned("parti")
    with torch.device("meta"):
        model = build_model(plan.fit(config))
    one, eight = (memory.state_bytes(model, config.optim, "fp32", ranks) for ranks in (1, 8))
    for part in ("gradients", "master", "moments"):
        assert eight[part] == one[part] / 8  # AdamW keeps nothing whole
    assert one["parameters"] / 8 < eight["parameters"] and eight["buckets"] == one["buckets"]


REPORT = """{"name": "gpu/machine/memory", "ours": 80.0, "baseline": null}
{"name": "gpu/machine/matmul-8192/bf16/vs-peak/throughput", "ours": 250.0, "baseline": 312.0}
{"name": "gpu/machine/matmul-8192/tf32/vs-peak/throughput", "ours": 78.0, "baseline": 156.0}
{"name": "gpu/machine/matmul-8192/fp32/vs-peak/throughput", "ours": 19.0, "baseline": 19.5}
{"name": "gpu/machine/host-to-device/throughput", "ours": 24.0, "baseline": null}
{"name": "gpu/machine/device-to-device/throughput", "ours": 1500.0, "baseline": null}
{"name": "gpu/losses", "failed": "no tests"}
{"name": "torn
"""


def test_a_report_of_a_gpu_takes_the_place_of_the_vendors_numbers(tmp_path):
    (tmp_path / "rows.jsonl").write_text(REPORT)
    report = {"gpu_report": tmp_path}
    for dtype, peak, efficiency in (("bf16", 312e12, 250 / 312), ("fp32", 156e12, 0.5)):  # TF32 is the faster way
        config = planned("parti", **report, dtype=dtype)
        found = with_machine(config, tmp_path, dtype)
        assert (found.gpu_bytes, found.peak_flops, found.efficiency) == (80e9, peak, pytest.approx(efficiency))
        assert (found.memory_bandwidth, found.host_bandwidth) == (1.5e12, 24e9)
        assert found.link_bandwidth == config.link_bandwidth and found.model == config.model
    own = with_machine(planned("parti", **report, efficiency=0.4), tmp_path, "fp32")
    assert own.efficiency == 0.4 and own.peak_flops == 156e12  # what is given stays
    rows = {entry["name"]: entry for entry in plan.rows(planned("parti", **report, nodes=[1]))}
    assert rows["plan/parti/1x8/fp32/master"]["baseline"] == 80.0 and rows["plan/parti/1x8/fp32/mfu"]["baseline"] == 0.5
    assert rows["plan/parti/1x8/fp32/gathers-across"]["ours"] == 2.0
    assert rows["plan/parti/1x8/fp32/reductions"]["ours"] == 1.0


def test_a_folder_that_is_no_report_of_a_gpu_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no rows\.jsonl; make one by `tokscale bench gpu"):
        next(plan.rows(planned("parti", gpu_report=tmp_path)))
    (tmp_path / "rows.jsonl").write_text('{"name": "gpu/machine", "failed": "no device"}\n')
    with pytest.raises(DataError, match=r"speed of products in tf32 or fp32; run `tokscale bench gpu sections"):
        next(plan.rows(planned("parti", gpu_report=tmp_path)))
