"""What the arithmetic of this machine is: a hash over the bits of the operations that training uses.

Two machines of equal hash train to equal digits. Neither the version of torch nor the instructions of the CPU say that:
libraries dispatch by vendor, cache and environment as well, and by the shape at hand. So the set of operations is the
one that the debug recipes ran when it was recorded (`python tests/contracts/test_losses.py --record`): each whose last
digit is open, with the shapes and strides of its tensors; products and attention in bf16, too. Each is run again on
numbers that integers have made. `python tests/arithmetic.py` prints the hash of the machine at hand.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RECORDED = Path(__file__).parent / "assets" / "operations.jsonl"

_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_IN_BF16 = {"mm": (2,), "addmm": (1, 2), "bmm": (3,), _ATTENTION: (4,), f"{_ATTENTION}_backward": (4,)}
"""Run in bf16 as well, and of how many dimensions the tensors are that are halved: attention's sums stay in fp32."""
_OPEN = frozenset(
    f"""mm addmm bmm {_ATTENTION} {_ATTENTION}_backward convolution convolution_backward
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    sum mean cumsum _foreach_norm linalg_vector_norm scatter_add_ index_put embedding_dense_backward
    _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data _safe_softmax
    mse_loss mse_loss_backward nll_loss_forward binary_cross_entropy_with_logits upsample_nearest2d_backward
    gelu gelu_backward silu silu_backward glu glu_backward sigmoid sigmoid_backward tanh tanh_backward
    exp exp_ log logit special_entr pow cos sin polar lerp addcmul linspace
    normal_ uniform_ exponential_ randn""".split()
)
"""Operations that libraries may round as they like; what IEEE 754 rounds, as one addition, is the same anywhere."""


class Recorder(TorchDispatchMode):
    """Takes down every operation of open rounding that runs inside: `lines`, one JSON value each."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _OPEN:
            self.lines.add(json.dumps([str(func), _written(list(args)), _written(kwargs or {})], separators=(",", ":")))
        return func(*args, **(kwargs or {}))


def _written(value: Any) -> Any:
    match value:
        case Tensor():
            offset = value.storage_offset() % 16  # What vectors see of a place in memory.
            return {"$tensor": [str(value.dtype)[6:], list(value.shape), list(value.stride()), offset]}
        case torch.Generator():
            return {"$generator": 0}
        case torch.dtype():
            return {"$dtype": str(value)[6:]}
        case torch.device() | torch.layout():
            return {"$left out": str(value)}
        case list() | tuple():
            return [_written(item) for item in value]
        case dict():
            return {key: _written(item) for key, item in value.items()}
    return value


def _read(value: Any, halved: Sequence[int]) -> Any:
    """What was written; in bf16 where the number of dimensions is one of `halved`."""
    match value:
        case {"$tensor": [dtype, shape, stride, offset]}:
            return numbers("bfloat16" if len(shape) in halved and dtype == "float32" else dtype, shape, stride, offset)
        case {"$generator": seed}:
            return torch.Generator().manual_seed(seed)
        case {"$dtype": name}:
            return getattr(torch, name)
        case {"$left out": _}:
            return None
        case list():
            return [_read(item, halved) for item in value]
        case dict():
            return {key: _read(item, halved) for key, item in value.items()}
    return value


def numbers(dtype: str, shape: list[int], stride: list[int], offset: int) -> Tensor:
    """Values between 0 and 1 that integers alone have made; zeros and ones where the type is one of integers."""
    size = (
        offset + 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    )
    values = (torch.arange(size) * 2654435761 + 12345) % 65521
    wanted = getattr(torch, dtype)
    values = values.to(torch.float64) / 65536 if wanted.is_floating_point or wanted.is_complex else values % 2
    return values.to(wanted).as_strided(shape, stride, offset if size else 0)


def results() -> Iterator[Tensor]:
    """Every tensor that is hashed: what each operation gives, and what it leaves in its arguments."""
    for line in RECORDED.read_text().splitlines():
        name, args, kwargs = json.loads(line)
        _, packet, overload = name.split(".")
        function = getattr(getattr(torch.ops.aten, packet), overload)
        for halved in ((), _IN_BF16[packet]) if packet in _IN_BF16 else ((),):
            given = _read(args, halved), _read(kwargs, halved)
            leaves = tree_leaves((function(*given[0], **given[1]), given))
            yield from (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point)
    yield from updated()


def updated() -> Iterator[Tensor]:
    """Weights after a few updates of the optimizer that the debug recipes train with."""
    weights = [torch.nn.Parameter(numbers("float32", list(shape), [shape[1], 1], 0)) for shape in ((96, 32), (37, 53))]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, betas=(0.9, 0.96), weight_decay=0.045, fused=True)
    for step in range(1, 4):
        for weight in weights:
            weight.grad = numbers("float32", list(weight.shape), list(weight.stride()), step) - 0.5
        optimizer.step()
    yield from weights


@cache
def fingerprint() -> str:
    """Hash of the bits of `results`, on one thread, and of torch's version, which may join operations otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    digest = hashlib.sha256(torch.__version__.partition("+")[0].encode())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for result in results():
                digest.update(result.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} lacks an operation: {error}"  # And so its arithmetic is another one.
    finally:
        torch.set_num_threads(threads)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(fingerprint())
