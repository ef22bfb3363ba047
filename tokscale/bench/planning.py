"""From a plan's keys to times: what a model's step is, what fits, and the best way to run it on so many GPUs."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from tokscale.bench.memory import BYTES, Need, gathered_bytes, state_bytes
from tokscale.bench.plan_time import (
    Choice,
    StepTime,
    Work,
    best,
    choices,
    smallest_tokens,
    stops_hiding,
    table,
)
from tokscale.engine.groups import freeze
from tokscale.models.registry import build_model

_ROOM = 0.92
"""Share of a GPU's memory that tensors may take; the rest is the context, the allocator's and the kernels'."""
_MOST = 256
_SHALLOW, _DEEPER = 2, 4
_DEPTHS = (("depth",), ("spatial_layers",), ("depth_layers",), ("condition", "depth"))
"""Keys of a model's configuration that say how often layers are repeated."""


class Planning:
    """A plan whose model was looked at once."""

    def __init__(self, config: Any, fitted: Any, remats: Sequence[str], need: Callable[[Any, Any, str], Need]):
        """Build the model on the meta device, and shallow ones to see what a layer needs.

        Args:
            config: A `PlanBench`.
            fitted: The model's configuration with its sizes.
            remats: Its values of `remat`.
            need: Of a model, a plan and a value of `remat`: bytes of a micro-batch.
        """
        self.config, self.remats, self._fitted, self._need = config, remats, fitted, need
        with torch.device("meta"):
            self._model = freeze(build_model(fitted), config.freeze)
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self._needs = {remat: (self._at_depth(remat, 1), self._at_depth(remat, 2)) for remat in remats}
        self._state = cache(lambda gpus: state_bytes(self._model, config.optim, config.dtype, gpus, config.ema))
        state, (one, two) = self._state(1), self._needs["none"]
        self.work = Work(
            parameters=self.parameters,
            flops=float(self._model.train_flops()),  # pyright: ignore[reportCallIssue] - every model has it
            kept=two.forward - one.forward,
            tokens=math.prod(config.code_shape) + getattr(fitted, "text_seq_len", 0),
            layers=sum(value for key in _DEPTHS if (value := _at(fitted, key)) is not None),
            # Masters and moments are read and written, the gradient is read, the working copy is written.
            update_bytes=(2 * (state["master"] + state["moments"]) + state["gradients"]) / self.parameters + 2,
        )

    def bytes(self, choice: Choice) -> float:
        """Of memory on each GPU."""
        state = sum(
            size
            for name, size in self._state(choice.gpus).items()
            if not (choice.offload and name in ("master", "moments", "averages"))
        )
        second = BYTES[self.config.dtype] * self.parameters / self.config.gpus if choice.hpz else 0.0
        one, two = self._needs[choice.remat]
        more = choice.micro_batch_size - 1
        need = Need(*(first + (other - first) * more for first, other in zip(one, two, strict=True)))
        return state + second + max(need) + gathered_bytes(self._model, self.config.dtype, choice.gpus, need)

    def fits(self, choice: Choice) -> bool:
        """Whether it fits, with some room."""
        return self.bytes(choice) <= _ROOM * self.config.gpu_bytes

    def best(self, gpus: int) -> tuple[Choice, StepTime] | None:
        """On so many GPUs."""
        tried = list(choices(gpus, self.config, self.remats, self.config.gpus, _MOST))
        dtype, node = self.config.dtype, self.config.gpus
        return best(self.work, tried, self.config, self.fits, dtype=dtype, gpus_per_node=node)

    def largest(self, gpus: int, remat: str) -> int:
        """The largest micro-batch that fits; 0 when none does."""
        sizes = range(1, _MOST + 1)
        return max((size for size in sizes if self.fits(Choice(gpus, size, remat=remat))), default=0)

    def header(self, gpus: Sequence[int]) -> list[str]:
        """What a recipe says about itself: size, the rule, and a line for each number of GPUs."""
        found = {number: self.best(number) for number in gpus}
        rule = smallest_tokens(self.config, self.config.dtype, max(gpus))
        trained = sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)
        part = f" ({trained / 1e9:.3g} B of them trained; times are those of training all)"
        part = part if trained < self.parameters else ""
        lines = [
            f"{self.parameters / 1e9:.3g} B parameters{part}, {self.work.tokens} tokens a sample; across nodes, "
            f"communication hides from {rule:.3g} tokens a micro-batch and GPU on"
        ]
        for line, pair in zip(table(found, self.config), found.values(), strict=True):
            lines.append(line if pair is None else f"{line}, {self.bytes(pair[0]) / 1e9:.0f} GB a GPU")
        point = stops_hiding(found)
        return [*lines, f"more than a tenth of a step waits for links from {point} GPUs on"] if point else lines

    def _at_depth(self, remat: str, size: int) -> Need:
        """What one micro-batch needs: that of a shallow model, and of each further layer as often as it comes."""
        config = self.config.model_copy(update={"micro_batch_size": size})
        keys = [key for key in _DEPTHS if (_at(self._fitted, key) or 0) > _DEEPER]
        shallow = self._fitted
        for key in keys:
            shallow = _with(shallow, key, _SHALLOW)
        base = self._need(shallow, config, remat)
        forward, backward = base
        for key in keys:
            deeper = self._need(_with(shallow, key, _DEEPER), config, remat)
            layers = ((_at(self._fitted, key) or 0) - _SHALLOW) / (_DEEPER - _SHALLOW)
            forward += layers * (deeper.forward - base.forward)
            backward += layers * (deeper.backward - base.backward)
        return Need(forward, backward)


def _at(model: Any, key: Sequence[str]) -> int | None:
    for name in key:
        model = getattr(model, name, None)
    return model if isinstance(model, int) else None


def _with(model: Any, key: Sequence[str], value: int) -> Any:
    first, *rest = key
    return model.model_copy(update={first: _with(getattr(model, first), rest, value) if rest else value})
