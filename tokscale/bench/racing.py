"""What both sides of `bench race` share: samples in one order, captions as states, the rate, and a clock.

Imported in the interpreter of the originals, too, so it needs torch alone.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

STATES = 128
"""Width of `caption_states`."""


def batches(count: int, size: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Numbers of the samples of each batch, without end: each epoch in another order, a last, smaller batch left out.

    Args:
        count: Samples.
        size: Of a batch.
        seed: Of the orders.
    """
    for epoch in itertools.count(seed):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        yield from order[: count // size * size].split(size)


def rate(step: int, lr: float, warmup_steps: int) -> float:
    """Constant after a linear rise, so that no side needs to know how many steps its time will give it."""
    return lr * min(1.0, (step + 1) / max(warmup_steps, 1))


def caption_states(ids: torch.Tensor, words: int) -> torch.Tensor:
    """States of captions for models that are told those of a frozen T5, of which none can be had without a network.

    A vector for each word and one for each place, drawn once and for all: both sides are told the same, and as much as
    the caption says.

    Args:
        ids: Of words, `(captions, length)`; 0 is padding, whose states are 0.
        words: Entries of the vocabulary.

    Returns:
        `(captions, length, STATES)`.
    """
    table = torch.randn(words + ids.shape[1], STATES, generator=torch.Generator().manual_seed(0))
    return (table[ids] + table[words:]) * (ids != 0)[..., None]


def plain_loop(
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    lr: float,
    warmup_steps: int,
    betas: Sequence[float],
    clip: float,
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The loop that the originals' READMEs have: loss, `backward`, Adam.

    Args:
        parameters: What learns.
        loss_of: Of the samples of these numbers.
        lr: Peak of the rate.
        warmup_steps: Until then.
        betas: Of Adam.
        clip: Largest norm of the gradient.

    Returns:
        `update` of `Slices`.
    """
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=lr, betas=(betas[0], betas[1]))

    def update(step: int, rows: torch.Tensor) -> torch.Tensor:
        optimizer.param_groups[0]["lr"] = rate(step, lr, warmup_steps)
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return update


class Slices:
    """A call trains for some seconds of wall time, and then writes the weights, which no clock counts."""

    def __init__(
        self,
        seconds: float,
        rows: Iterator[torch.Tensor],
        update: Callable[[int, torch.Tensor], torch.Tensor],
        write: Callable[[], None],
        prepare: Callable[[], object] = lambda: None,
    ):
        """Nothing runs yet.

        Args:
            seconds: Of a call; the step that passes them is finished.
            rows: Numbers of the samples of each batch.
            update: A training step by its number and its samples; gives its loss.
            write: Keeps the weights for whoever measures them.
            prepare: What a side does once before its first step, on its clock.
        """
        self._seconds, self._rows, self._update, self._write, self._prepare = seconds, rows, update, write, prepare
        self._steps = 0

    def __call__(self) -> dict[str, Any]:
        """One slice: its seconds of wall and of CPU time, all steps so far, and the mean of this slice's losses."""
        wall, cpu, losses = time.perf_counter(), time.process_time(), []
        if not self._steps:
            self._prepare()
        while not losses or time.perf_counter() - wall < self._seconds:
            losses.append(float(self._update(self._steps, next(self._rows))))
            self._steps += 1
        taken = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        self._write()
        return taken | {"steps": self._steps, "loss": sum(losses) / len(losses)}
