"""The loss on samples that training never sees, while it trains."""

import time
from collections.abc import Callable, Mapping, Sequence

from pydantic import Field
from torch import Tensor

from tokscale.base import rng
from tokscale.base.batch import Batch
from tokscale.base.config import Config
from tokscale.base.protocols import Engine
from tokscale.dist.comm import Comm
from tokscale.models.common import evaluating
from tokscale.train.hooks import Hook
from tokscale.train.task import named_scalars

PREFIX = "held_out/"


class HeldOutConfig(Config):
    """How often to measure on the samples that `data.held_out` keeps from training."""

    every_steps: int = Field(default=500, ge=1)
    """Steps between measurements; the last step is always measured. Nothing is measured where nothing is held out."""
    samples: int = Field(default=512, ge=1)
    """Samples to measure on, the first of those held out, over all ranks."""
    averages: tuple[str, ...] = ()
    """Averaged weights to measure, too: `ema/0.999` for `engine.ema=[0.999]`, as `held_out/ema/0.999/loss`."""


class HeldOutLoss(Hook):
    """Measures the loss, its parts and the model's own metrics through the engine's forward pass, whatever it shards.

    Evaluation mode: no dropout, every caption is seen. What else is random follows from the samples' places, so that
    two measurements differ by the weights alone.
    """

    def __init__(
        self,
        config: HeldOutConfig,
        engine: Engine,
        batches: Sequence[Callable[[], Batch]],
        *,
        comm: Comm,
        total_steps: int,
        seed: int,
        weights: Sequence[float] = (),
    ):
        """Measure on `batches`: as many on every rank, of as many samples each; read anew every time.

        Args:
            config: How often.
            engine: Of the model.
            batches: Of this rank.
            weights: What each batch counts, where they are of different sizes: images of several shapes.
            comm: The job.
            total_steps: The last one is measured, too.
            seed: Base of the random streams.
        """
        self._config, self._engine, self._batches = config, engine, batches
        self._comm, self._total, self._seed = comm, total_steps, seed
        self._weights = list(weights) or [1.0] * len(batches)

    def measures(self, step: int) -> bool:
        """Every so many steps, and the last one."""
        return step % self._config.every_steps == 0 or step == self._total

    def measure(self, step: int) -> Mapping[str, float]:
        """`held_out/loss`, `held_out/loss/<part>`, the model's metrics, and `held_out/seconds`."""
        del step
        began = time.perf_counter()
        found = self._losses()
        for name in self._config.averages:
            with self._engine.averaged(name):
                found |= {f"{name}/{key}": value for key, value in self._losses().items()}
        found["seconds"] = self._comm.max(time.perf_counter() - began)
        return {PREFIX + name: value for name, value in found.items()}

    def _losses(self) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        with evaluating(self._engine.model):
            for number, (read, weight) in enumerate(zip(self._batches, self._weights, strict=True)):
                names = ("held_out", number, self._comm.rank)
                with rng.scope(self._seed, *names, device=self._comm.device):
                    output = self._engine(read().to(self._engine.device))
                for name, value in named_scalars(output).items():  # on the device: no batch waits for the one before
                    sums[name] = sums.get(name, 0.0) + weight * value.double()
        return self._comm.mean({name: total.item() / sum(self._weights) for name, total in sums.items()})
