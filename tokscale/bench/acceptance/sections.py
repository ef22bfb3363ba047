"""The sections of the acceptance in their order, with the seconds that each may take on a GPU."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tokscale.bench.acceptance import device, models, runs
from tokscale.bench.acceptance.setting import Setting


class Section(NamedTuple):
    """One part of the acceptance."""

    seconds: float
    """Its share of ten minutes; what it leaves goes to those after it."""
    rows: Callable[[Setting], Iterator[dict[str, Any]]]


SECTIONS = {
    "machine": Section(20, device.machine),
    "numerics": Section(80, device.numerics),
    "losses": Section(75, models.losses),
    "training": Section(150, models.training),
    "decoding": Section(60, models.decoding),
    "tokenizers": Section(35, runs.tokenizers),
    "saving": Section(30, runs.saving),
    "tests": Section(55, runs.tests),
    "quickstart": Section(60, runs.quickstart),
    "trace": Section(25, models.trace),
}
