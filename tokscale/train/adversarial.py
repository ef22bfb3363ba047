"""A generator and its discriminator, each in an engine of its own."""

from collections import ChainMap
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from tokscale.base.batch import Batch, Carried, StepReport, StepResult
from tokscale.base.protocols import Engine, LossModel
from tokscale.tokenizers.vqgan.discriminator import Discriminator, ImagePairBatch
from tokscale.train.task import mean_scalars, named_scalars


class _Generator(LossModel, Protocol):
    adversary: Any


class AdversarialTask:
    """The generator takes its step, then the discriminator, on the reconstructions that the generator just made.

    They are those from before its update, as in LlamaGen: nothing is computed twice.
    """

    def __init__(self, generator: Engine, discriminator: Engine, *, start_step: int = 0, micro_batches: int = 1):
        """Train both, each batch split into `micro_batches` equal parts; the discriminator from `start_step` on."""
        self.engines: Mapping[str, Engine] = {engine.name: engine for engine in (generator, discriminator)}
        self._generator, self._discriminator = generator, discriminator
        self._start_step, self._micro_batches = start_step, micro_batches
        self._probe = _DiscriminatorProbe(discriminator)

    def step(self, batch: Batch, step: int) -> StepResult:
        """Forward, backward and update of one network and then of the other."""
        discriminator_active = step >= self._start_step
        model = cast(_Generator, self._generator.model)
        model.adversary = self._probe if discriminator_active else None
        model.anneal(step)
        micro_batches = batch.to(self._generator.device).split(self._micro_batches)
        outputs = []
        for micro_batch in micro_batches:
            output = self._generator(micro_batch)
            self._generator.backward(output.total)
            outputs.append(named_scalars(output))
        reports, metrics = {}, ChainMap[str, float]()
        self._update(self._generator, outputs, step, reports, metrics)
        model.adversary = None
        if discriminator_active:
            pairs = [
                ImagePairBatch(positions=part.positions, real=real, rebuilt=rebuilt)
                for part, (rebuilt, real) in zip(micro_batches, self._probe.pop_samples(), strict=True)
            ]
            self._update(self._discriminator, self._train_discriminator(pairs, step), step, reports, metrics)
        return StepResult(metrics=metrics, reports=reports, averaged=True)

    def _train_discriminator(self, pairs: list[ImagePairBatch], step: int) -> list[dict[str, Tensor]]:
        cast(LossModel, self._discriminator.model).anneal(step)
        outputs = []
        for pair in pairs:
            output = self._discriminator(pair)
            self._discriminator.backward(output.total)
            outputs.append(named_scalars(output))
        return outputs

    def _update(
        self,
        engine: Engine,
        outputs: list[dict[str, Tensor]],
        step: int,
        reports: dict[str, StepReport],
        metrics: ChainMap[str, float],
    ) -> None:
        """One engine's step, whose message carries its metrics; the discriminator's under its name."""
        means = mean_scalars(outputs)
        engine.carry(means)
        reports[engine.name] = report = engine.step(step)
        prefix = "" if engine is self._generator else f"{engine.name}/"
        metrics.maps.append(cast(dict[str, float], Carried(report, means, prefix)))

    def state_dict(self) -> dict[str, Any]:
        """Nothing beyond the engines' own state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        del state


class _DiscriminatorProbe:
    """An `Adversary`: the discriminator's opinion, with a memory of what it was shown."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._shown: list[tuple[Tensor, Tensor]] = []

    def __call__(self, rebuilt: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        self._shown.append((rebuilt, real))
        rebuilt = rebuilt.detach().requires_grad_()
        with self._engine.gathered() as model:
            discriminator = cast(Discriminator, model)
            value = discriminator.generator_loss(discriminator.score(rebuilt))
            (gradient,) = torch.autograd.grad(value, rebuilt)
        return value.detach(), gradient

    def pop_samples(self) -> list[tuple[Tensor, Tensor]]:
        """Reconstructions and images since the last call."""
        shown, self._shown = self._shown, []
        return shown
