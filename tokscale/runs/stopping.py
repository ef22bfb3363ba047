"""What becomes of a stage that keeps finished pieces of its work, and was asked to stop."""

from collections.abc import Iterator
from contextlib import contextmanager

from tokscale.base.errors import StopRequested
from tokscale.dist.slurm import refuse_short_time
from tokscale.train.signals import StopRequests


@contextmanager
def stopping_for(requests: StopRequests, stage: str) -> Iterator[None]:
    """What is stopped inside comes again if a scheduler asked for it, and if the next start would get further.

    Raises:
        StopRequested: As it was raised inside; for good when a person asked.
        EnvironmentRefused: When the time limit is too short for a single piece.
    """
    try:
        yield
    except StopRequested as error:
        if not requests.flags()["requeue"]:
            raise StopRequested(str(error), again=False) from None
        refuse_short_time(stage)
        raise
