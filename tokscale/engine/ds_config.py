"""DeepSpeed's configuration, complete: every default that changes results or memory is written down here."""

from typing import Any

from tokscale.base.errors import ConfigError
from tokscale.engine.config import COMPUTES_BF16, ZeroConfig

LARGEST_BUCKET = 500_000_000
"""Elements; DeepSpeed's own default, one to two gigabytes per rank."""
FP32_REDUCTION_RANKS = 64
"""From so many ranks on gradients travel in fp32, unless `reduce_dtype` says otherwise: a ring adds one rank's share
after another, and n additions in bf16 lose about sqrt(n) / 256 of the sum."""
LARGE_MODEL = 1_000_000_000
"""Parameters from which `sharded_init=auto` divides a model while it is made."""
SMALLEST_BUCKET = 1_000_000
"""Elements; below this, messages cost more than they carry."""


def deepspeed_config(
    config: ZeroConfig, *, parameters: int, micro_batches: int, micro_batch_size: int, world: int = 1, hpz: int = 1
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize` and `deepspeed.zero.Init`.

    Args:
        config: The engine's options.
        parameters: Elements of the whole model, from which `auto` buckets are sized.
        micro_batches: Backward passes per step.
        micro_batch_size: Samples per micro batch and rank.
        world: Ranks.
        hpz: Ranks that share a second copy of the parameters, see `hpz_ranks`.
    """
    bf16 = COMPUTES_BF16[working_dtype(config)]
    return {
        # Not train_batch_size: when zero.Init reads this, DeepSpeed may not know the world size yet.
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "bf16": {"enabled": bf16},
        # By default gradients accumulate over micro batches in the working dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": reduction_dtype(config, world),
        # The engine measures, checks and clips by itself; DeepSpeed's default is 1.0.
        "gradient_clipping": 0.0,
        "zero_optimization": _zero(config, parameters, hpz),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        # Its default waits for the device twice a step.
        "timers": {"throughput": {"enabled": False}},
    }


def working_dtype(config: ZeroConfig) -> str:
    """The dtype of the parameters that forward reads.

    Stages 2 and 3 keep a bf16 copy of fp32 masters. In stages 0 and 1 DeepSpeed's bf16 holds whole fp32 gradients, or
    accumulates in bf16; autocast over fp32 parameters takes the same memory and is exactly what the eager engine does.
    """
    return config.dtype if config.stage >= 2 else "fp32"


def reduction_dtype(config: ZeroConfig, world: int) -> str:
    """Of gradients on the wire."""
    if config.reduce_dtype is not None:
        return config.reduce_dtype
    return "bf16" if working_dtype(config) == "bf16" and world < FP32_REDUCTION_RANKS else "fp32"


def hpz_ranks(config: ZeroConfig, world: int, local_world: int) -> int:
    """Ranks that share a second copy of the parameters; 1 for none.

    Raises:
        ConfigError: When they do not divide the job.
    """
    size = local_world if config.zero_hpz_partition_size == "node" else config.zero_hpz_partition_size
    if size >= world:
        return 1
    if world % size:
        raise ConfigError(
            f"engine.zero_hpz_partition_size: {size} ranks do not divide a job of {world}; take a divisor, or 1"
        )
    return size


def _zero(config: ZeroConfig, parameters: int, hpz: int) -> dict[str, Any]:
    bucket = config.reduce_bucket_size
    if bucket == "auto":
        bucket = min(max(parameters // 4, SMALLEST_BUCKET), LARGEST_BUCKET)
    prefetch = config.prefetch_bucket_size
    if prefetch == "auto":
        prefetch = max(bucket * 9 // 10, 1)
    options: dict[str, Any] = {
        "stage": config.stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,
        "overlap_comm": config.overlap_comm,
        # The engine has the norm already. Stages 1 and 2 insist on measuring it again where they offload; the others
        # accept no other value, where stage 0 has no norm and the layout replaces stage 3's step.
        "compute_grad_norm": config.offload_optimizer or config.stage in (0, 3),
        "round_robin_gradients": False,
        # Replaces torch.nn.functional.linear for the whole process, and breaks selective checkpointing.
        "memory_efficient_linear": False,
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_param_persistence_threshold": config.param_persistence_threshold,
        "stage3_max_live_parameters": config.max_live_parameters,
        "stage3_max_reuse_distance": config.max_reuse_distance,
        "stage3_module_granularity_threshold": config.module_granularity_threshold,
        "sub_group_size": config.sub_group_size,
        "zero_hpz_partition_size": hpz,
        # Written down though they are the defaults: refused by name in our own configuration until tried on GPUs.
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        "zero_quantized_nontrainable_weights": False,
    }
    if config.offload_optimizer:
        options["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return options
