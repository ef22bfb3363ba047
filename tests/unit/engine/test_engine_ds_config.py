"""What DeepSpeed is told, and which combinations of options are refused."""

import pytest

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.engine.config import EngineConfig, OptimizerConfig, ZeroConfig
from tokscale.engine.ds_config import LARGEST_BUCKET, SMALLEST_BUCKET, deepspeed_config


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
