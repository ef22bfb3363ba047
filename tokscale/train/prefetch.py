"""The batches of a run, read one ahead: a rank that cannot read says so in the exchange of the step before.

Ranks that wait in a collective for one that has left hear of a broken connection, and of nothing else. Since the next
batch is in hand before the exchange, the exchange carries whether everyone has it, at no cost.
"""

import time
from collections.abc import Mapping
from typing import Any

from tokscale.base.batch import Batch
from tokscale.base.protocols import Loader
from tokscale.dist.comm import Comm


class Prefetcher:
    """One batch of a loader, held ready."""

    def __init__(self, loader: Loader, comm: Comm):
        """Read nothing yet."""
        self._loader, self._comm = loader, comm
        self._state: dict[str, Any] = {}
        self._batch: Batch | None = None
        self._failure: Exception | None = None
        self._all_have = False
        self._waited = 0.0

    @property
    def failed(self) -> bool:
        """Whether this rank could not read the batch ahead."""
        return self._failure is not None

    def prefetch(self) -> None:
        """Read the next batch. A failure is kept until every rank knows of it."""
        self._state = self._loader.state_dict()
        began = time.perf_counter()
        try:
            self._batch = self._loader.next_batch()
        except Exception as error:
            self._failure = error
        self._waited = time.perf_counter() - began

    def confirm_all_ranks(self, any_failed: bool) -> None:
        """What the exchange said of all ranks' `failed`."""
        self._all_have = not any_failed

    def next(self) -> tuple[Batch, float]:
        """The batch that was read ahead, and the seconds that it took. Collective, unless all are known to have theirs.

        Raises:
            Exception: What a rank failed with, on every rank.
        """
        if not self._all_have:
            with self._comm.raise_together("reading the data"):
                if self._failure is not None:
                    raise self._failure
        assert self._batch is not None
        batch, self._batch, self._all_have = self._batch, None, False
        return batch, self._waited

    def state_dict(self) -> dict[str, Any]:
        """Of the loader, as it was before it read the batch that is held ready."""
        return self._state if self._batch is not None or self.failed else self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the loader stood."""
        self._batch = self._failure = None
        self._all_have = False
        self._loader.load_state_dict(state)
