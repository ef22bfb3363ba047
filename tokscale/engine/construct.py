"""Make a model that no rank ever holds whole: every parameter is divided as soon as its module is made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokscale.base.errors import ConfigError
from tokscale.engine.config import COMPUTES_BF16, ZeroConfig
from tokscale.engine.ds_config import deepspeed_config


def construct_sharded(deepspeed: Any, make_model: Callable[[], nn.Module], config: ZeroConfig) -> nn.Module:
    """Call `make_model` under `deepspeed.zero.Init`. Collective.

    Modules are made in fp32 whatever the working dtype: inside `zero.Init` every float constructor takes its dtype,
    and position tables or other buffers would lose their precision unseen. The sharded parameters are cast afterwards.

    Raises:
        ConfigError: When a module writes to a parameter of another that is divided already, which would be lost.
    """
    fp32 = config.model_copy(update={"dtype": "fp32"})
    options = deepspeed_config(fp32, parameters=0, micro_batches=1, micro_batch_size=1)
    with deepspeed.zero.Init(config_dict_or_path=options), _NoLostWrites():
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
                "would be lost; initialise parameters in the module that owns them, or set sharded_init=false"
            )
        return function(*arguments, **(keywords or {}))


def whole_numel(model: nn.Module) -> int:
    """Elements of all parameters, divided or not."""
    return sum(torch.Size(getattr(p, "ds_shape", p.shape)).numel() for p in model.parameters())
