"""Make a model that no rank ever holds whole: every parameter is divided as soon as its module is made."""

from collections.abc import Callable
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokscale.base.errors import ConfigError
from tokscale.engine.backend import hpz_group
from tokscale.engine.config import COMPUTES_BF16, EagerConfig, ZeroConfig
from tokscale.engine.ds_config import LARGE_MODEL, deepspeed_config


def divides_while_making(config: ZeroConfig, make_model: Callable[[], nn.Module]) -> bool:
    """Whether a model is to be divided while it is made; `auto` counts its parameters on a device without memory."""
    if config.sharded_init != "auto":
        return config.sharded_init
    if config.stage != 3:
        return False
    with torch.device("meta"):
        return whole_numel(make_model()) >= LARGE_MODEL


def host_bytes(config: EagerConfig | ZeroConfig, parameters: int, world: int) -> int:
    """Host memory in which one rank of a job on GPUs makes its engine, in bytes.

    A whole model is made in fp32; of a divided one a rank holds its share. What `offload_optimizer` keeps on the
    host is fp32: masters, two moments and the gradient.
    """
    match config:
        case EagerConfig():
            return 4 * parameters
        case ZeroConfig():
            divides = parameters >= LARGE_MODEL if config.sharded_init == "auto" else config.sharded_init
            made = 4 * parameters // (world if divides and config.stage == 3 else 1)
            return made + (16 * parameters // world if config.offload_optimizer else 0)
        case _:
            assert_never(config)


def construct_sharded(
    deepspeed: Any, make_model: Callable[[], nn.Module], config: ZeroConfig, hpz: int = 1
) -> nn.Module:
    """Call `make_model` under `deepspeed.zero.Init`. Collective.

    Modules are made in fp32 whatever the working dtype: inside `zero.Init` every float constructor takes its dtype,
    and position tables or other buffers would lose their precision unseen. The sharded parameters are cast afterwards.

    Raises:
        ConfigError: When a module writes to a parameter of another that is divided already, which would be lost.
    """
    fp32 = config.model_copy(update={"dtype": "fp32"})
    options = deepspeed_config(fp32, parameters=0, micro_batches=1, micro_batch_size=1, hpz=hpz)
    group = hpz_group() if hpz > 1 else None
    with deepspeed.zero.Init(config_dict_or_path=options, zero_param_parallel_group=group), _NoLostWrites():
        model = make_model()
    if COMPUTES_BF16[config.dtype]:
        divided: list[Any] = list(model.parameters())
        for parameter in divided:
            parameter.ds_tensor.data = parameter.ds_tensor.data.bfloat16()
            parameter.data = parameter.data.bfloat16()
    return model


class _NoLostWrites(TorchFunctionMode):
    """Forbid in-place functions on empty tensors, which is what a sharded parameter looks like."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        writes = name.endswith("_") and not name.startswith("_") and name not in ("requires_grad_", "detach_")
        # The functions of torch.nn.init arrive with their tensor as a keyword.
        target = next(iter((*arguments, *(keywords or {}).values())), None)
        if writes and isinstance(target, Tensor) and target.numel() == 0:
            raise ConfigError(
                f"engine.sharded_init: a module calls {name}() on a parameter that is divided already, so its values "
                "would be lost; initialise parameters in the module that owns them, or set engine.sharded_init=false"
            )
        return function(*arguments, **(keywords or {}))


def whole_numel(model: nn.Module) -> int:
    """Elements of all parameters, divided or not."""
    return sum(map(undivided_numel, model.parameters()))


def undivided_numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, divided or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape)).numel()
