"""What a program would do to a CUDA device: kernels launched, values read back, small copies, wrong devices and types.

`FakeTensorMode` itself raises where devices mix. The rest is seen by a dispatch mode that stands above it.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.cuda.amp.common
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import tokscale
from tokscale.bench.live import NO_KERNEL
from tokscale.nn.attention import backend, flex, relative_flex

DEVICE = torch.device("cuda", 0)
_PACKAGE = str(Path(tokscale.__file__).parent) + "/"
_HERE = str(Path(__file__).parent) + "/"
_PINNED = WeakTensorKeyDictionary()
"""Has tensors of the host that a device copies from and to by itself: nobody waits for that."""

# Kernels whose floating-point operands must be of one type on CUDA, although a CPU may take several.
_OF_ONE_TYPE = frozenset(["mm", "addmm", "bmm", "baddbmm", "convolution", "native_layer_norm", "native_group_norm"])


class Place(NamedTuple):
    """A function of the package; of what autograd itself launches, `autograd`."""

    file: str
    function: str


class Ledger(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.reads: Counter[tuple[Place, str]] = Counter()
        """Where the host waits for a value, and by what."""
        self.copies: Counter[tuple[Place, str]] = Counter()
        """Where memory of the host is copied to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(tensor.device.type == "cuda" for tensor in tensors):
            if tensors and (answer := self._read(func, name, args, kwargs, tensors)) is not None:
                return answer  # of the host itself: nobody waits, and any answer will do
            out = func(*args, **kwargs)
            if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda" for leaf in tree_leaves(out)):
                # `_to_copy` is the only operation with operands of the host and a result of the device
                if tensors and not (tensors[0] in _PINNED and kwargs.get("non_blocking")):
                    self.copies[_place(), name] += 1
                self.kernels += name not in NO_KERNEL
            return out
        if name in _OF_ONE_TYPE:
            one_type(name, *tensors)
        if name == "copy_" and tensors[1].device.type == "cpu" and tensors[1].dim():
            self.copies[_place(), name] += 1
        # An index on the host goes to the device first, and the host waits for it.
        if name in ("index", "index_put", "index_put_") and any(
            t is not None and t.device.type == "cpu" for t in args[1]
        ):
            self.copies[_place(), name] += 1
        answer = None if name == "copy_" and _sent_back(args, kwargs) else self._read(func, name, args, kwargs, tensors)
        if answer is not None:
            return answer
        self.kernels += name not in NO_KERNEL
        out = func(*args, **kwargs)
        if name == "to" and any(
            isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves(out)
        ):
            self.reads[_place(), name] += 1
        return out

    def _read(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """What an operation gives whose result or shape the host has to wait for; None for every other operation."""
        first, device = tensors[0], kwargs.get("device")
        some = max(first.numel() // 2, 1)
        make: Callable[[], Any] | None = None
        if name in ("_local_scalar_dense", "item"):  # the second in inference mode, where nothing is taken apart
            make = lambda: True if first.dtype == torch.bool else 1.5 if first.is_floating_point() else 1  # noqa: E731
        elif name == "equal":
            make = lambda: False  # noqa: E731
        elif name == "nonzero":
            make = lambda: first.new_zeros(some, first.dim(), dtype=torch.int64)  # noqa: E731
        elif name == "masked_select":
            make = lambda: first.new_empty(some)  # noqa: E731
        elif name == "bincount":
            least = kwargs.get("minlength", args[2] if len(args) > 2 else 1)
            make = lambda: first.new_zeros(max(least, 1), dtype=torch.int64)  # noqa: E731
        elif name in ("unique", "_unique2", "unique_consecutive", "repeat_interleave") and not _sized(args, kwargs):
            make = lambda: func(*args, **kwargs)  # noqa: E731
        elif name in ("index", "index_put", "index_put_") and any(_is_mask(index) for index in args[1]):
            places = [place for index in args[1] for place in _places(index)]
            make = lambda: func(args[0], places, *args[2:], **kwargs)  # noqa: E731
        elif (name == "_to_copy" and device is not None and torch.device(device).type == "cpu") or (
            name == "copy_" and first.device.type == "cpu"
        ):
            make = lambda: func(*args, **kwargs)  # noqa: E731
        if make is None:
            return None
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self.reads[_place(), name] += 1
            self.kernels += name not in NO_KERNEL
        return make()


def one_type(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise unless all floating-point operands of a kernel are of one type."""
    kinds = {str(t.dtype) for t in tensors if t is not None and t.is_floating_point()}
    if len(kinds) > 1:
        raise RuntimeError(f"{name}: operands of {' and '.join(sorted(kinds))}")


class _Fused(torch.autograd.Function):
    """One kernel forward, one backward: what a fused attention is on CUDA. The numbers are nobody's."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, *beside)
        heads = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        return q.new_zeros(*heads, q.shape[-2], v.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), saved = grads, ctx.saved_tensors
        one_type("backward pass of attention", grad, *saved[:3])
        return tuple(
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip(saved, ctx.needs_input_grad, strict=True)
        )


def fused(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *beside: torch.Tensor | None) -> torch.Tensor:
    """A fused attention; `beside` is what it reads besides: masks, tables.

    Raises:
        RuntimeError: When a kernel would refuse the operands.
    """
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
    one_type(name, q, k, v)
    given = [t for t in beside if t is not None]
    places = {t.device for t in (q, k, v, *given)}
    if len(places) > 1:
        raise RuntimeError(f"{name}: operands on {places}")
    return _Fused.apply(q, k, v, *given)  # type: ignore[no-any-return, misc]


def _sdpa(
    real: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if query.device.type != "cuda":
        return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        if torch.is_autocast_enabled("cuda"):
            attn_mask = attn_mask.to(torch.get_autocast_dtype("cuda"))
        else:
            one_type("mask of attention", query, attn_mask)
    trains = torch.is_grad_enabled() and query.requires_grad
    if attn_mask is not None and trains and torch.backends.cuda.cudnn_sdp_enabled():
        raise RuntimeError("under a mask: the backward pass of cuDNN, which PyTorch prefers on an H100, gives NaN")
    if attn_mask is not None and is_causal:
        raise RuntimeError("a mask and is_causal exclude each other")
    return fused("scaled_dot_product_attention", query, key, value, attn_mask)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *beside: Any) -> torch.Tensor:
    *tables, mask = beside
    return fused("flex_attention", q, k, v, *tables, mask.kv_num_blocks)


def _pinning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same, and what is asked for in pinned memory is kept in mind: a CPU build has none."""

    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if pin_memory:
            _PINNED[tensor] = True
        return tensor

    return made


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake, CUDA's branches are taken, and fused attentions are one kernel each."""
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch.cuda, "Event", mock.Mock()),
            (torch.cuda, "current_stream", mock.Mock()),
            (torch.cuda, "get_rng_state", lambda device=None: torch.zeros(16, dtype=torch.uint8, device="cpu")),
            (torch.cuda, "set_rng_state", lambda state, device=None: None),
            (torch, "tensor", _pinning(torch.tensor)),
            (torch, "empty", _pinning(torch.empty)),
            (F, "scaled_dot_product_attention", functools.partial(_sdpa, F.scaled_dot_product_attention)),
            (flex, "_compiled", lambda pattern: _flex),
            (relative_flex, "_compiled", lambda places: _flex),
            (backend, "find_spec", lambda name: name == "triton" or None),
            (relative_flex, "find_spec", lambda name: name == "triton" or None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def to_cuda(module: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """What `module.to(device, dtype)` does, for fake tensors; plain attributes stay where they are, as they would."""
    moved: dict[int, torch.nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                if id(parameter) not in moved:
                    value = torch.empty(parameter.shape, dtype=kind, device=DEVICE)
                    moved[id(parameter)] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
                child._parameters[name] = moved[id(parameter)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
    return module


def forget_tables() -> None:
    """Empty the package's caches, so that what is counted does not depend on what ran before."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tokscale.") and module is not None:
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear") and hasattr(value, "cache_info"):
                    value.cache_clear()


def _sent_back(args: Any, kwargs: Any) -> bool:
    """Whether `copy_` begins a copy to pinned memory, and goes on."""
    return args[0] in _PINNED and (kwargs.get("non_blocking") or args[2:] == (True,))


def _sized(args: Any, kwargs: Any) -> bool:
    return kwargs.get("output_size") is not None


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _places(index: Any) -> list[Any]:
    if not _is_mask(index):
        return [index]
    count = max(index.numel() // 2, 1)
    return [torch.zeros(count, dtype=torch.int64, device=index.device) for _ in range(index.dim())]


def _place() -> Place:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            return Place(path.removeprefix(_PACKAGE), frame.f_code.co_qualname)
        if path.startswith(_HERE) and not path.endswith("ledger.py"):
            return Place("tests", frame.f_code.co_qualname)
        frame = frame.f_back
    return Place("autograd", "")
