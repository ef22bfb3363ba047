"""What happens inside a model while it trains, on request: gradients by layer, and how far attention spreads."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tokscale.base import rng
from tokscale.base.batch import Batch
from tokscale.base.config import Config
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import Engine
from tokscale.dist.comm import Comm
from tokscale.engine.common import CommonEngine
from tokscale.models.common import evaluating
from tokscale.nn.attention.module import Attention
from tokscale.nn.attention.reference import attention_weights
from tokscale.train.hooks import Hook


class DiagnosticsConfig(Config):
    """What to measure inside the model. It changes no bit of the training."""

    gradient_norms_every: int = Field(default=0, ge=0)
    """Steps between `grad_norm/<group>` in `metrics.jsonl`: the L2 norm of the gradient before clipping, over all
    ranks, of each layer and of each module outside the layers. 0 never; else each step reads its gradient twice."""
    attention_entropy_every: int = Field(default=0, ge=0)
    """Steps between `attention_entropy/<layer>`, in nats: how far the queries of a layer spread over the keys they see,
    on the first held-out samples of every rank. 0 nats is one key, log(n) are n keys alike. Of attention over patterns:
    DALL-E, RQ-Transformer, CLIP and caption encoders; not of what MaskGIT and Parti have of their own. 0 never."""


class GradientNorms(Hook):
    """`grad_norm/<group>`; under the engine's name when a task has several."""

    def __init__(self, every: int, engines: Mapping[str, Engine]):
        """Ask the engines to measure from now on."""
        self._every, self._engines = every, dict[str, CommonEngine]()
        for name, engine in engines.items():
            assert isinstance(engine, CommonEngine)
            engine.gradient_group = layer_of
            self._engines[name] = engine

    def measures(self, step: int) -> bool:
        """Every so many steps."""
        return step % self._every == 0

    def measure(self, step: int) -> Mapping[str, float]:
        """Of the step that was just made: every rank has the same."""
        del step
        found: dict[str, float] = {}
        for name, engine in self._engines.items():
            prefix = f"{name}/" if len(self._engines) > 1 else ""
            found |= {f"{prefix}grad_norm/{group}": norm for group, norm in engine.gradient_norms.items()}
        return found


def layer_of(name: str) -> str:
    """The group of a parameter: its name up to the first number (`stack.layers.3`), else its outermost module."""
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return parts[0] if number is None else ".".join(parts[: number + 1])


class AttentionEntropy(Hook):
    """`attention_entropy/<layer>` of held-out samples, through the engine's forward pass, whatever it shards."""

    def __init__(self, every: int, engine: Engine, read: Callable[[], Batch], *, comm: Comm, seed: int):
        """Look at the batch that `read` gives, the same on every call.

        Raises:
            ConfigError: When no attention of the model can be looked into.
        """
        self._every, self._engine, self._read, self._comm, self._seed = every, engine, read, comm, seed
        self._layers = {name: module for name, module in engine.model.named_modules() if isinstance(module, Attention)}
        if not self._layers:
            raise ConfigError(
                "diagnostics.attention_entropy_every: this model has no attention over a pattern to look into; set it "
                "to 0"
            )

    def measures(self, step: int) -> bool:
        """Every so many steps."""
        return step % self._every == 0

    def measure(self, step: int) -> Mapping[str, float]:
        """In evaluation mode; a mean over samples, heads, queries and ranks."""
        del step
        began, found = time.perf_counter(), dict[str, list[float]]()
        names = ("attention entropy", self._comm.rank)
        with (
            torch.no_grad(),
            evaluating(self._engine.model),
            rng.scope(self._seed, *names, device=self._comm.device),
            _watched(self._layers, found),
        ):
            self._engine(self._read().to(self._engine.device))
        means = {f"attention_entropy/{name}": sum(seen) / len(seen) for name, seen in found.items()}
        return self._comm.mean(means) | {"attention_entropy/seconds": self._comm.max(time.perf_counter() - began)}


@contextmanager
def _watched(layers: Mapping[str, Attention], found: dict[str, list[float]]) -> Iterator[None]:
    """Inside, each attention also says how far it spreads, and computes what it always does."""

    def watch(name: str, module: Attention) -> None:
        plain = module.attend

        def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, **how: Any) -> Tensor:
            with torch.no_grad():
                found.setdefault(name, []).append(entropy(module, q, k, key_mask))
            return plain(q, k, v, key_mask, **how)

        vars(module)["attend"] = attend  # of this object alone; it hides the method

    for name, module in layers.items():
        watch(name, module)
    try:
        yield
    finally:
        for module in layers.values():
            del vars(module)["attend"]


def entropy(module: Attention, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> float:
    """Mean entropy of a layer's attention in nats, from queries and keys `(batch, heads, seq, dim)`."""
    total, count = 0.0, 0
    for at in range(len(q)):
        one = slice(at, at + 1)
        mask = None if key_mask is None else key_mask[one]
        weights = attention_weights(q[one].float(), k[one].float(), module.pattern, mask, stable=module.stable)
        spread = torch.special.entr(weights).sum(-1)
        total, count = total + spread.sum().item(), count + spread.numel()
    return total / count
