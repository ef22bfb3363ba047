"""Counting on a device that may not be there: bytes of live tensors, and operations that would be kernels.

Both work on any device, the meta device included, since they watch what is called and not what a machine does.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = frozenset(
    [
        "_local_scalar_dense",
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "device",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "is_same_size",
        "lift_fresh",
        "narrow",
        "new_empty",
        "new_empty_strided",
        "permute",
        "reshape",
        "resize_",
        "select",
        "set_",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
        "view_as_complex",
        "view_as_real",
    ]
)
"""Operations that only say where existing numbers are to be found."""


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages made inside that are still in use, and the most there were at once.

    A storage counts once, however many tensors share it, from the operation that gave it out until nobody holds it.
    What an operation needs while it runs is not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        """Count from nothing on; storages of `known` tensors, made before, never count."""
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in known}
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, Any] = {}

    def restart(self) -> None:
        """Forget the peak so far; it is now what is in use."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._add(size - self._sizes.get(key, 0))  # one that was resized counts anew
        self._sizes[key] = size
        if key not in self._watches:
            self._watches[key] = weakref.finalize(storage, self._gone, key)
            self._watches[key].atexit = False

    def _gone(self, key: int) -> None:
        del self._watches[key]
        self._add(-self._sizes.pop(key))

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class Launches(TorchDispatchMode):
    """How many operations inside would each be a kernel or more on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.split("::")[-1] not in NO_KERNEL
        return func(*args, **(kwargs or {}))
