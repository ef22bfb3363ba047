"""`bench train` and `bench decode` with the smallest models: what they say adds up."""

import warnings

import pytest
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.bench import plan, train
from tokscale.bench.decode import DecodeBench
from tokscale.bench.decode import rows as decode_rows
from tokscale.bench.stepping import full_train_flops, host_waits
from tokscale.bench.train import TrainBench
from tokscale.engine.config import EagerConfig
from tokscale.models.registry import build_model

SIZES = {"codes": 32, "words": 40, "code_shape": (4, 4), "device": "cpu"}
STACK = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
DALLE = STACK | {"kind": "dalle", "text_seq_len": 8, "attn_types": ["full", "axial_row"]}
EAGER = {"kind": "eager", "dtype": "fp32"}


def named(rows) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


def test_every_setting_is_tried_and_the_fastest_repeated():
    asked = {"remats": ["none", "block"], "backends": ["dense"], "micro_batch_sizes": [1, 2], "steps": 1}
    config = decode(TrainBench, SIZES | asked | {"model": DALLE, "engine": EAGER, "warm_steps": 2})
    found = named(train.rows(config))
    rates = {name: row["ours"] for name, row in found.items() if name.endswith("/step/throughput")}
    tried = [name.removeprefix("train/dalle/").removesuffix("/fp32/eager/step/throughput") for name in rates]
    settings = [f"b{size}/remat-{remat}" for remat in ("none", "block") for size in (1, 2)]
    assert tried[:4] == settings and tried[4].endswith("/attn-backend-dense") and tried[5].startswith("best/")
    *others, best = rates.values()
    assert best == max(others)
    mfu = found["train/dalle/b2/remat-none/fp32/eager/mfu/vs-fp32-matmul"]
    full = found["train/dalle/b2/remat-none/fp32/eager/mfu-full/vs-fp32-matmul"]
    assert 0 < mfu["ratio"] < full["ratio"] and mfu["baseline"] == full["baseline"]
    held = found["train/dalle/b1/remat-none/fp32/eager/step/memory"]["ours"]
    assert held < found["train/dalle/b2/remat-none/fp32/eager/step/memory"]["ours"]
    assert found["train/dalle/b2/remat-none/fp32/eager/step/launches"]["unit"] == "operations"


def test_sizes_grow_until_one_does_not_fit(monkeypatch):
    def trained(config, comm, setting):
        if setting.micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")
        return train.Trained(1.0 / setting.micro_batch, 24 * setting.micro_batch, 1e9, 2e9, 1e6, 10, 0.25, 3)

    monkeypatch.setattr(train, "trained", trained)
    asked = {"remats": ["none"], "micro_batch_sizes": [1, 2, 4, 8]}
    found = list(train.rows(decode(TrainBench, SIZES | asked | {"model": DALLE, "engine": EAGER})))
    (skipped,) = [row for row in found if "skipped" in row]
    assert "/b4/" in skipped["name"] and skipped["skipped"].endswith("Tried to allocate 1 GiB")
    assert not [row for row in found if "/b8/" in row["name"]]
    best = named(found)["train/dalle/best/b2/remat-none/fp32/eager/step/idle"]
    assert best["ours"] == 0.25 and best["unit"] == "of a step"
    assert named(found)["train/dalle/best/b2/remat-none/fp32/eager/step/host-waits"]["ours"] == 3


def test_waits_are_those_that_torch_warns_of(monkeypatch):
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    assert host_waits(step, torch.device("cuda", 0)) == 2 and modes == ["warn", "default"]
    assert host_waits(step, torch.device("cpu")) is None


def test_compiling_is_tried_where_the_engine_can(monkeypatch):
    monkeypatch.setattr(train, "trained", lambda *_: train.Trained(1.0, 24, 1e9, 2e9, 1e6, 10, None, None))
    asked = {"remats": ["none"], "micro_batch_sizes": [1], "compile": [True]}
    config = decode(TrainBench, SIZES | asked | {"model": DALLE, "engine": EAGER})
    if "compile" in EagerConfig.model_fields:
        assert any("/compile-true/" in name for name in named(train.rows(config)))
        return
    with pytest.raises(ConfigError, match=r"engine\.kind=eager has no key of that name"):
        list(train.rows(config))


def test_the_other_convention_counts_all_pairs_of_positions():
    sizes = {name: SIZES[name] for name in ("codes", "words", "code_shape")}
    config = decode(plan.PlanBench, sizes | {"model": DALLE | {"attn_types": ["full"]}})
    with torch.device("meta"):
        model = build_model(plan.fit(config))
    length = 8 + 16
    masked = length * length - length * (length + 1) // 2
    assert full_train_flops(model) - model.train_flops() == 3 * 4 * 32 * masked * 2


@pytest.mark.parametrize("scale", [1, 3])
def test_decoding_has_a_rate_for_each_batch(scale):
    config = decode(DecodeBench, SIZES | {"model": DALLE, "batches": [1, 2], "cond_scale": scale, "rounds": 1})
    found = named(decode_rows(config))
    guided = "/guided" if scale > 1 else ""
    for batch in (1, 2):
        rate = found[f"decode/dalle/b{batch}/fp32{guided}/throughput"]["ours"]
        assert found[f"decode/dalle/b{batch}/fp32{guided}/code/time"]["ours"] == pytest.approx(1e3 * batch / rate / 16)
    assert found[f"decode/dalle/b1/fp32{guided}/code/launches"]["ours"] > 10


def test_a_model_of_images_does_not_decode():
    with pytest.raises(ConfigError, match=r"model\.kind=clip"):
        list(decode_rows(decode(DecodeBench, SIZES | {"model": {"kind": "clip"}})))
