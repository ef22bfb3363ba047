"""Saving beside training: a copy of this rank's shard in host memory, and one background thread that writes it."""

import atexit
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokscale.base.log import logger
from tokscale.base.state import TensorShard

_log = logger("checkpoint")


class HostCopy:
    """Host memory for one rank's shards, kept between saves: a copy into touched pages costs a tenth of a first one."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, str, int], Tensor] = {}

    def copy(self, engine: str, shards: Iterable[TensorShard]) -> list[TensorShard]:
        """Shards with the same content in this object's own memory; valid until the next call for the engine."""
        copied, devices = [], set()
        for shard in shards:
            source = shard.data.detach()
            buffer = self._buffer((engine, shard.name, shard.slot, shard.start), source)
            if source.is_cuda:
                buffer.copy_(source, non_blocking=True)
                devices.add(source.device)
            else:  # training waits for this: the memory is moved half as fast again as by copy_
                np.copyto(_bytes(buffer), _bytes(source.contiguous()))
            copied.append(TensorShard(shard.name, shard.slot, shard.shape, shard.start, buffer))
        for device in devices:
            torch.cuda.synchronize(device)
        return copied

    def _buffer(self, key: tuple[str, str, str, int], source: Tensor) -> Tensor:
        known = self._buffers.get(key)
        if known is None or known.numel() != source.numel() or known.dtype != source.dtype:
            known = torch.empty(source.numel(), dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = known
        return known


def _bytes(flat: Tensor) -> np.ndarray:
    return flat.view(torch.uint8).numpy()


class AsyncSave:
    """One save under way in a background thread."""

    def __init__(self, step: int, work: Callable[[], Path]):
        """Start `work` at once."""
        self.step = step
        self._path: Path | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=f"save-step-{step}", daemon=True)
        atexit.register(self._abandoned)
        self._thread.start()

    def done(self) -> bool:
        """True when the thread has ended, well or badly."""
        return not self._thread.is_alive()

    def result(self) -> Path:
        """Wait for the end; the checkpoint's folder.

        Raises:
            BaseException: What the save failed with.
        """
        self._thread.join()
        atexit.unregister(self._abandoned)
        if self._failure is not None:
            raise self._failure
        assert self._path is not None
        return self._path

    def _run(self, work: Callable[[], Path]) -> None:
        try:
            self._path = work()
        except BaseException as error:  # handed to the training thread by result()
            self._failure = error

    def _abandoned(self) -> None:
        _log.error(
            "the process ends while the save of step %d is under way; it does not count. Call CheckpointStore.close()",
            self.step,
        )
