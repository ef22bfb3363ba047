"""What a stage may add to the loop: called by name, in order, on every rank."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokscale.train.metrics import MetricsWriter


class Hook:
    """Does nothing; override what is needed. Every method runs on every rank, so it may hold collectives.

    A hook leaves training as it is, to the last bit: it draws from random streams of its own, and puts back the mode
    of every module.
    """

    ended = False
    """Set to end the run after this step, saved and done. The same on every rank."""
    wants_save = False
    """Set in `on_step` to have this step saved. The same on every rank; only where `due` said so."""

    def on_begin(self, step: int, writer: "MetricsWriter | None") -> None:
        """Once, before the first step of this process.

        Args:
            step: Steps that earlier processes of the run have done.
            writer: Takes images; None on all ranks but the main one.
        """

    def due(self, step: int) -> bool:
        """Whether this hook must see the weights as `step` steps left them: the loop then waits for that step.

        Otherwise it is called when the step's metrics arrive, with the next step under way. The same on every rank.
        """
        del step
        return False

    def measures(self, step: int) -> bool:
        """Whether `measure` has numbers for the line of `step`, which is then written. The same on every rank."""
        del step
        return False

    def measure(self, step: int) -> Mapping[str, float]:
        """Numbers by name, equal on every rank, with the weights as `step` steps left them; where `measures` said so.

        The time that it takes is not counted in the rates of training.
        """
        del step
        return {}

    def on_step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """After each optimizer step, once its metrics are there.

        Args:
            step: Steps done so far, 1 after the first.
            metrics: This step's metrics, averaged over ranks.
        """

    def on_save(self, step: int) -> None:
        """After a checkpoint of `step` steps is handed to the store."""

    def on_end(self, step: int) -> None:
        """Once, when the last step of the run is done and saved; not when the run was asked to stop."""
