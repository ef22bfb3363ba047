"""What stands around every training: its machines are looked at before it, and watched while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokscale.base.config import fingerprint
from tokscale.base.errors import StalledError
from tokscale.dist.comm import Comm
from tokscale.dist.device import choose_device
from tokscale.dist.env import ProcessEnv
from tokscale.dist.interfaces import refuse_unreachable
from tokscale.dist.slurm import NodesRefusedError
from tokscale.runs.outcome import Attempt
from tokscale.runs.segments import ResumableConfig
from tokscale.train.preflight import WANTED, PreflightConfig, preflight
from tokscale.train.watchdog import Watchdog, WatchdogConfig


class GuardedConfig(ResumableConfig):
    """Keys of every stage that trains."""

    preflight: PreflightConfig = PreflightConfig()
    """What must hold of the machines before training."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """How long nothing may happen."""
    device: str = "auto"
    """`cpu`, `cuda` (each rank its own GPU), or `auto`: CUDA when there is one. `auto` refuses to train on CPUs in a
    job that was given GPUs."""


def join(config: GuardedConfig, env: ProcessEnv) -> Comm:
    """Meet the other ranks, on machines that reach each other. Collective.

    Raises:
        NodesRefusedError: Naming each node that does not reach the first one.
    """
    if WANTED[config.preflight.when](env):
        try:
            refuse_unreachable(env)
        except NodesRefusedError as error:
            raise NodesRefusedError(str(error), error.nodes if config.preflight.exclude_bad_nodes else ()) from None
    return Comm(env, choose_device(config.device, env.local_rank))


@contextmanager
def guarded(
    config: GuardedConfig, comm: Comm, *, stage: str, folder: Path, files: Callable[[], Sequence[Path]]
) -> Iterator[Watchdog]:
    """Refuse machines that are not fit for the run, then watch it inside the context. Collective.

    Args:
        config: Of the stage; must be equal on all ranks.
        comm: The ranks.
        stage: Its name, for the word that a stall leaves in `run_dir`.
        folder: Of the training run: gets heartbeats and stacks, and needs room.
        files: Lists the data, of which each rank reads a piece of some; called on one rank.

    Raises:
        NodesRefusedError: Naming every problem and its node.
    """
    settings = {"configuration": fingerprint(config)}
    preflight(config.preflight, comm, folder=folder, files=files, settings=settings)

    def on_stall(error: StalledError) -> None:
        Attempt(config.run_dir, stage, comm.env).fail(error.exit_code, error)

    with Watchdog(config.watchdog, comm, folder, on_stall) as watchdog:
        yield watchdog
