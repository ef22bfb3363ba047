"""What a stage may add to the loop: called by name, in order, on every rank."""

from collections.abc import Mapping


class Hook:
    """Does nothing; override what is needed. Every method runs on every rank, so it may hold collectives."""

    def due(self, step: int) -> bool:
        """Whether `on_step` must see the weights as `step` steps left them: the loop then waits for that step.

        Otherwise it is called when the step's metrics arrive, with the next step under way. The same on every rank.
        """
        del step
        return False

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
