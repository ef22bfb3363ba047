"""Bring DeepSpeed up without its surprises: no compiler, no shared lock, no chatter, no second process group.

The version is pinned, since the engine relies on private behaviour that the tests of this part hold still.
"""

import atexit
import logging
import os
import shutil
import sys
import tempfile
import warnings
from typing import Any

import torch.distributed as torch_dist

from tokscale.base.errors import ConfigError, EnvironmentRefused
from tokscale.dist.comm import Comm
from tokscale.dist.env import export

VERSION = "0.19.8"


def load_deepspeed(comm: Comm) -> Any:
    """The `deepspeed` module, ready to build engines in this job. Collective; later calls cost nothing.

    Raises:
        EnvironmentRefused: When DeepSpeed is missing, of another version, or already bound to another device.
    """
    device = comm.device.type
    export(comm.env)
    os.environ["DS_ACCELERATOR"] = device
    # Nothing should be compiled; if something is, a lock that a killed job left behind must not block this one.
    # A fresh folder: whoever shares the temporary one could have made any name that can be foretold.
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        private = tempfile.mkdtemp(prefix="tokscale_extensions_")
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = private
    try:
        import deepspeed
        import deepspeed.comm
    except ImportError as error:
        raise EnvironmentRefused(
            f"engine.kind=zero needs deepspeed {VERSION} ({error}); pip install 'tokscale[train]', or use eager"
        ) from None
    if deepspeed.__version__ != VERSION:
        raise EnvironmentRefused(
            f"deepspeed {deepspeed.__version__} is installed, but the engine relies on private behaviour of {VERSION}; "
            f"pip install deepspeed=={VERSION}"
        )
    accelerator: Any = deepspeed.accelerator.get_accelerator()
    chosen = accelerator._name
    if chosen != device:
        raise EnvironmentRefused(
            f"deepspeed was imported for {chosen!r} before the engine asked for {device!r}; "
            f"set DS_ACCELERATOR={device} in the environment"
        )
    _quieten()
    _let_one_rank_run_ahead()
    if not torch_dist.is_initialized():  # a single process: DeepSpeed wants a group all the same
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store = torch_dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        torch_dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        # The CPU shared-memory op is an optimisation that a compiler would have to build at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(dist_backend=torch_dist.get_backend(), verbose=False)
    return deepspeed


def _let_one_rank_run_ahead() -> None:
    """A rank alone gathers nothing, yet its host would wait for the device at every module under stage 3.

    What such a gather copies, if anything, is on the stream that the module's kernels are queued on, too.
    """
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    def one(handle: Any, **_: Any) -> None:
        handle._NoGatherHandle__param.ds_status = ZeroParamStatus.AVAILABLE

    def several(handle: Any, **_: Any) -> None:
        for param in handle._NoGatherCoalescedHandle__params:
            param.ds_status = ZeroParamStatus.AVAILABLE

    partition_parameters.NoGatherHandle.wait = one  # pyright: ignore[reportAttributeAccessIssue]
    partition_parameters.NoGatherCoalescedHandle.wait = several  # pyright: ignore[reportAttributeAccessIssue]


def hpz_group() -> Any:
    """The ranks with which this one shares a second copy of the parameters, as DeepSpeed knows them; None before."""
    from deepspeed.utils import groups

    return groups._get_zero_param_intra_parallel_group()


def agree_on_hpz(size: int) -> None:
    """Refuse an engine that would not share its second copy as the first one of this process does.

    DeepSpeed keeps one set of such groups for the whole process, and uses it for every engine of stage 3.

    Raises:
        ConfigError: When an earlier engine of this process has another size.
    """
    group = hpz_group()
    there = 1 if group is None else torch_dist.get_world_size(group)
    if _HPZ and there != size:
        raise ConfigError(
            f"engine.zero_hpz_partition_size: {size} here, but an earlier engine of this process has {there}; "
            "all engines of a process share one setting"
        )
    _HPZ.append(size)


_HPZ: list[int] = []
"""Sizes of the engines of stage 3 that were made so far."""


def _quieten() -> None:
    """Errors only: DeepSpeed's information is about its own configuration, which we set ourselves."""
    for name in ("DeepSpeed", "deepspeed"):
        library = logging.getLogger(name)
        library.setLevel(logging.ERROR)
        for handler in library.handlers:
            handler.setLevel(logging.ERROR)
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.stderr)
    # Collectives that torch 2.13 renamed, and DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", message=r".*(all_gather_into|reduce_scatter)_tensor` is deprecated")
