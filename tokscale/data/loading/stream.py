"""What every loader shares: one rank's part of global batches that are ranges of positions, prepared ahead."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from tokscale.base.batch import Batch
from tokscale.base.errors import ConfigError, DataError
from tokscale.data.loading.prefetch import Prefetcher

P = TypeVar("P")
B = TypeVar("B", bound=Batch)


class PositionLoader(ABC, Generic[P, B]):
    """An endless stream whose global batch t is positions `[t * B, (t + 1) * B)`; rank r of D takes its r-th part.

    Subclasses make what a thread may make ahead (`prepare`) and what must happen in the training thread (`deliver`).
    """

    def __init__(self, *, batch_size: int, rank: int, world: int, prefetch: int):
        """Start at position 0.

        Args:
            batch_size: Samples of a global batch.
            rank: This rank among those that share the batch.
            world: How many they are.
            prefetch: Batches that a thread prepares ahead; 0 prepares in the training thread.

        Raises:
            ConfigError: When the ranks do not divide the batch.
        """
        if batch_size % world:
            raise ConfigError(
                f"a global batch of {batch_size} samples does not divide among {world} ranks; choose a multiple"
            )
        self.batch_size = batch_size
        self._share = batch_size // world
        self._first = rank * self._share
        self._depth = prefetch
        self._position = 0
        self._ahead: Prefetcher[P] | None = None

    @abstractmethod
    def prepare(self, start: int, stop: int) -> P:
        """The samples at positions `[start, stop)`."""

    @abstractmethod
    def deliver(self, prepared: P) -> B:
        """A batch of what was prepared."""

    @abstractmethod
    def order_settings(self) -> Mapping[str, Any]:
        """What decides which sample lies at which position; JSON-ready, equal on all ranks."""

    @property
    def position(self) -> int:
        """Samples that all ranks together have been given."""
        return self._position

    def next_batch(self) -> B:
        """This rank's share of the next global batch.

        Raises:
            DataError: When what is stored is damaged.
        """
        if self._ahead is None:
            self._ahead = Prefetcher(self._batches(self._position), self._depth, type(self).__name__)
        prepared = next(self._ahead)
        self._position += self.batch_size
        return self.deliver(prepared)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands and what it is made of; JSON-ready, equal on all ranks."""
        return {"position": self._position, **self.order_settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a position, at any number of ranks and with any batch size.

        Raises:
            DataError: When the stream is not the one that was being read.
        """
        for name, value in self.order_settings().items():
            if state.get(name) != value:
                raise DataError(
                    f"the checkpoint's data order has {name}={state.get(name)!r}, this run has {value!r}: the samples "
                    f"would not be those that come next; set {name} as it was, or start a new run"
                )
        self.close()
        self._position = int(state["position"])

    def close(self) -> None:
        """Stop preparing ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _batches(self, position: int) -> Iterator[P]:
        while True:
            start = position + self._first
            yield self.prepare(start, start + self._share)
            position += self.batch_size
