"""What happens inside a model while it trains, on request: gradients by layer, and how far attention spreads."""

import time
from collections.abc import Callable, Mapping

import torch
from pydantic import Field

from tokscale.base import rng
from tokscale.base.batch import Batch
from tokscale.base.config import Config
from tokscale.base.errors import ConfigError
from tokscale.base.protocols import Engine
from tokscale.base.shapes import Float, Tensor
from tokscale.dist.comm import Comm
from tokscale.engine.common import CommonEngine
from tokscale.models.common import evaluating
from tokscale.nn.attention.observed import looking, observed
from tokscale.train.hooks import Hook


class DiagnosticsConfig(Config):
    """What to measure inside the model. It changes no bit of the training."""

    gradient_norms_every: int = Field(default=0, ge=0)
    """Steps between `grad_norm/<group>` in `metrics.jsonl`: the L2 norm of the gradient before clipping, over all
    ranks, of each layer and of each module outside the layers. 0 never; else each step reads its gradient twice."""
    attention_entropy_every: int = Field(default=0, ge=0)
    """Steps between `attention_entropy/<layer>`, in nats: how far the queries of a layer spread over the keys they see,
    on the first held-out samples of every rank. 0 nats is one key, log(n) are n keys alike. Of every attention of
    DALL-E, RQ-Transformer, CLIP, MaskGIT, Parti and the encoders of captions; what a model reads of its caption is
    `attention_entropy/<layer>.cross_attn`, over samples that are told something. A learned null key (MaskGIT, Parti) is
    one of the keys. 0 never."""


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
        self._layers = observed(engine.model)
        if not self._layers:
            raise ConfigError(
                "diagnostics.attention_entropy_every: this model has no attention that can be looked into; set it to 0"
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
            looking(self._layers, lambda name, weights: found.setdefault(name, []).append(spread(weights))),
        ):
            self._engine(self._read().to(self._engine.device))
        means = {f"attention_entropy/{name}": sum(seen) / len(seen) for name, seen in found.items()}
        return self._comm.mean(means) | {"attention_entropy/seconds": self._comm.max(time.perf_counter() - began)}


def spread(weights: Float[Tensor, "heads queries keys"]) -> float:
    """Mean entropy in nats of what queries take of keys."""
    return torch.special.entr(weights).sum(-1).mean().item()
