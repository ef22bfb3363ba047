"""What DeepSpeed is told, and which combinations of options are refused."""

import pytest
import torch

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.engine.config import EagerConfig, EngineConfig, OptimizerConfig, ZeroConfig
from tokscale.engine.construct import divides_while_making, host_bytes
from tokscale.engine.ds_config import LARGEST_BUCKET, SMALLEST_BUCKET, deepspeed_config, hpz_ranks, reduction_dtype


def options(parameters=10_000_000, **config):
    return deepspeed_config(ZeroConfig(**config), parameters=parameters, micro_batches=4, micro_batch_size=3)


def test_defaults_that_change_results_are_set():
    told = options(stage=3, dtype="bf16")
    assert told["gradient_clipping"] == 0.0
    assert told["data_types"] == {"grad_accum_dtype": "fp32"}
    assert told["bf16"] == {"enabled": True} and told["communication_data_type"] == "bf16"
    assert told["zero_optimization"]["memory_efficient_linear"] is False
    assert told["zero_optimization"]["overlap_comm"] is False
    assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]) == (3, 4)
    assert "train_batch_size" not in told


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_is_autocast_where_nothing_is_gained_by_a_bf16_copy(stage):
    told = options(stage=stage, dtype="bf16")
    assert told["bf16"] == {"enabled": False} and told["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("parameters", "bucket"), [(100, SMALLEST_BUCKET), (40_000_000, 10_000_000), (20_000_000_000, LARGEST_BUCKET)]
)
def test_buckets_grow_with_the_model(parameters, bucket):
    zero = options(parameters=parameters)["zero_optimization"]
    assert zero["reduce_bucket_size"] == bucket
    assert zero["stage3_prefetch_bucket_size"] == bucket * 9 // 10
    assert options(reduce_bucket_size=7)["zero_optimization"]["reduce_bucket_size"] == 7


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            EngineConfig,
            {"kind": "zero", "stage": 2, "sharded_init": True},
            "sharded_init divides parameters, .* stage 2",
        ),
        (EngineConfig, {"kind": "zero", "stage": 0, "offload_optimizer": True}, "offload_optimizer needs divided"),
        (
            EngineConfig,
            {"kind": "zero", "reduce_bucket_size": 0},
            "got 0; input should be greater than 0",
        ),
        (EngineConfig, {"kind": "zero", "zero_quantized_weights": True}, "have not run on GPUs here; leave it out"),
        (EngineConfig, {"kind": "zero", "zero_quantized_gradients": True}, "have not run on GPUs here; leave it out"),
        (EngineConfig, {"kind": "zero", "mics_shard_size": 8}, "DeepSpeed 0.19.8 has no MiCS"),
        (EngineConfig, {"kind": "zero", "stage": 2, "zero_hpz_partition_size": 8}, "whole at stage 2; use stage 3"),
        (EngineConfig, {"kind": "zero", "stage": 4}, "stage: got 4"),
        (EngineConfig, {"kind": "eager", "ema": [0.9, 0.9]}, "each decay names one average"),
        (EngineConfig, {"kind": "eager", "ema": [1.0]}, "ema"),
        (EngineConfig, {"kind": "eagre"}, "did you mean 'eager'"),
        (OptimizerConfig, {"kind": "adamw", "betas": [0.9, 1.0]}, "betas"),
        (OptimizerConfig, {"kind": "adamm"}, "did you mean 'adamw'"),
    ],
)
def test_bad_options_are_refused(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        decode(kind, values)


def test_what_matters_across_nodes_can_be_set_and_is_written_down():
    told = options()["zero_optimization"]
    defaults = {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9, "sub_group_size": 10**9}
    assert defaults.items() <= told.items() and told["stage3_module_granularity_threshold"] == 0
    assert told["zero_hpz_partition_size"] == 1 and not told["zero_quantized_weights"]
    chosen = options(max_live_parameters=1, max_reuse_distance=2, sub_group_size=3, module_granularity_threshold=4)
    names = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "sub_group_size")
    assert [chosen["zero_optimization"][name] for name in names] == [1, 2, 3]
    assert chosen["zero_optimization"]["stage3_module_granularity_threshold"] == 4


def test_gradients_travel_in_fp32_where_many_are_added():
    bf16 = ZeroConfig(stage=3, dtype="bf16")
    assert [reduction_dtype(bf16, world) for world in (8, 63, 64, 2048)] == ["bf16", "bf16", "fp32", "fp32"]
    assert reduction_dtype(bf16.model_copy(update={"reduce_dtype": "bf16"}), 2048) == "bf16"


def test_the_second_copy_is_divided_over_a_node_or_there_is_none():
    def ranks(size, world: int) -> int:
        return hpz_ranks(ZeroConfig(zero_hpz_partition_size=size), world, 8)

    assert [ranks("node", world) for world in (1, 8, 16)] == [1, 1, 8] and ranks(4, 8) == 4
    with pytest.raises(ConfigError, match="3 ranks do not divide a job of 8"):
        ranks(3, 8)


def test_a_large_model_is_divided_while_it_is_made():
    def of(parameters: int):
        return lambda: torch.nn.Linear(parameters // 1000, 1000, bias=False)

    assert divides_while_making(ZeroConfig(), of(10**9)) and not divides_while_making(ZeroConfig(), of(10**8))
    assert not divides_while_making(ZeroConfig(sharded_init=False), of(10**9))
    assert not divides_while_making(ZeroConfig(stage=2), of(10**9))
    assert host_bytes(ZeroConfig(), 12 * 10**9, 64) == 4 * 12 * 10**9 // 64
    assert host_bytes(ZeroConfig(sharded_init=False), 12 * 10**9, 64) == host_bytes(EagerConfig(), 12 * 10**9, 64)
    assert host_bytes(ZeroConfig(offload_optimizer=True), 12 * 10**9, 64) == 20 * 12 * 10**9 // 64
