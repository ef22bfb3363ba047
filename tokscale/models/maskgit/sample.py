"""Drawing codes: all masked, then looked at again and again, each time with the least likely ones masked anew."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from tokscale.base.batch import TEXT_EMBEDS
from tokscale.base.errors import ConfigError
from tokscale.base.rng import mix64, uniforms
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.models.grids import Grid
from tokscale.models.maskgit.config import MaskGitConfig, MaskGitSampling
from tokscale.models.maskgit.critic import SelfCritic, critic_logits
from tokscale.models.maskgit.layers import Memory
from tokscale.models.maskgit.network import ConditioningInputs, Transformer
from tokscale.models.maskgit.schedule import masked_share
from tokscale.nn.conditioning import Context
from tokscale.nn.replay import Replayed
from tokscale.nn.sampling import SampleStreams, top_p

NEGATIVE = "negative."
"""Prefix of the entries of `extra` that say what to be guided away from."""


class Noise(Protocol):
    """Where a sampler takes its chance from."""

    def gumbel(
        self, step: int, places: Int[Tensor, "batch n"], ids: Int[Tensor, "batch n k"]
    ) -> Float[Tensor, "batch n k"]:
        """Of some ids at some places."""
        ...

    def uniform(self, step: int, name: str, count: int) -> Float[Tensor, "batch image"]:
        """In (0, 1), one for each of `count` places."""
        ...


class SeededNoise(Noise):
    """A function of each sample's own seed, the step, the place and the id: the same in any batch, on any device."""

    def __init__(self, seeds: Sequence[int], steps: int, device: torch.device | str = "cpu"):
        self._seeds, self._steps, self._device = seeds, steps, device
        self._known: dict[str, SampleStreams] = {}

    def gumbel(
        self, step: int, places: Int[Tensor, "batch n"], ids: Int[Tensor, "batch n k"]
    ) -> Float[Tensor, "batch n k"]:
        """See `Noise`."""
        rows = mix64(mix64(rearrange(self._streams(step, "code"), "b -> b 1")) ^ places)
        return -torch.log(-torch.log(uniforms(rows, ids))).float()

    def uniform(self, step: int, name: str, count: int) -> Float[Tensor, "batch image"]:
        """See `Noise`."""
        return uniforms(self._streams(step, name), torch.arange(count, device=self._device)).float()

    def _streams(self, step: int, name: str) -> Tensor:
        if name not in self._known:
            every = [f"{name}/{number}" for number in range(self._steps)]
            self._known[name] = SampleStreams(self._seeds, every, self._device)
        return self._known[name].at(f"{name}/{step}")


@dataclass(frozen=True)
class EditInputs:
    """What stands before the first step: nothing, or an image and the places that may change."""

    codes: Int[Tensor, "batch image"] | None
    redraw: Bool[Tensor, "batch image"] | None

    @classmethod
    def of(
        cls, codes: Int[Tensor, "batch image"] | None, redraw: Bool[Tensor, "batch image"] | None, how: MaskGitSampling
    ) -> "EditInputs":
        """Inputs for editing, or empty ones.

        Raises:
            ConfigError: When there is something to edit with but nothing to edit, or an image that would not change.
        """
        if codes is None and (redraw is not None or how.edit_iterations):
            raise ConfigError("redraw and sampling.edit_iterations change an image: give its codes")
        if codes is not None and redraw is None and not how.edit_iterations:
            raise ConfigError(
                "codes without redraw would stay as they are; say where to redraw, or set edit_iterations"
            )
        return cls(codes, redraw)


def negative_of(
    extra: Mapping[str, Tensor], text: Int[Tensor, "batch text"]
) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
    """What to be guided away from, in the form that a `ConditioningEncoder` takes; None when nothing is."""
    found = {name.removeprefix(NEGATIVE): value for name, value in extra.items() if name.startswith(NEGATIVE)}
    if not found:
        return None
    plain = {name: value for name, value in extra.items() if not name.startswith(NEGATIVE)}
    if "text" not in found and TEXT_EMBEDS not in found:
        raise ConfigError(f"{NEGATIVE}*: got {sorted(found)}; give {NEGATIVE}text or {NEGATIVE}{TEXT_EMBEDS}")
    ids = found.pop("text", text)
    return ids, found.pop("text_mask", ids != 0), plain | found


class Sampler:
    """The loop over steps, for one batch.

    Args:
        config: Of the model.
        net: The generator.
        critic: Its critic, if there is one.
        how: Options.
        inputs: What the model is told.
        negative_inputs: What to be guided away from; no text at all when left out.
        noise: Chance.
        grid: Rows and columns of codes.

    Raises:
        ConfigError: When the model was not trained for an option.
    """

    def __init__(
        self,
        config: MaskGitConfig,
        net: Transformer,
        critic: Transformer | SelfCritic | None,
        *,
        how: MaskGitSampling,
        inputs: ConditioningInputs,
        negative_inputs: ConditioningInputs | None,
        noise: Noise,
        grid: Grid,
    ):
        self.config, self.net, self.how, self.noise = config, net, how, noise
        self.grid, self.count = grid, grid[0] * grid[1]
        self.guided = how.guided
        self.batch = len(inputs.text.states)
        self.critic = None if how.force_not_use_token_critic else critic
        if how.can_remask_prev_masked and self.critic is None and not self.config.no_mask_token_prob:
            raise ConfigError(
                "sampling.can_remask_prev_masked reads probabilities of codes that are visible, which this model never "
                "learnt: it was trained with model.no_mask_token_prob=0; leave the key out"
            )
        self.memories = self._memories(self.net, inputs, negative_inputs)
        self.critic_memories = self.memories
        if isinstance(self.critic, Transformer):
            self.critic_memories = self._memories(self.critic, inputs, negative_inputs)
        device = inputs.text.states.device
        self._look = Replayed(lambda ids, embed: self.net(ids, self.memories, embed, grid=grid), device)
        judge = self.critic
        self._judge = judge and Replayed(
            lambda ids: critic_logits(judge, self.net, ids, self.critic_memories, grid), device
        )

    def run(self, edit: EditInputs, progress: Callable[[int, int], None] | None = None) -> Int[Tensor, "batch image"]:
        """Draw, or change what `edit` holds."""
        count, device = self.count, self.memories[0].keys.device
        ids = edit.codes
        if ids is None:
            ids = torch.full((self.batch, count), self.net.num_tokens, dtype=torch.int64, device=device)
        free = torch.ones_like(ids, dtype=torch.bool) if edit.redraw is None else edit.redraw
        # The only wait for the device, and where the whole image is drawn there is none.
        room = count if edit.redraw is None else int(free.sum(dim=1).max())
        editing, steps = self.how.edit_iterations, self.how.steps
        scores = torch.zeros_like(ids, dtype=torch.float32)
        embed = None
        for step in range(steps):
            if editing:
                scores, share = self.noise.uniform(step, "edit", count), self.how.edit_rate
            else:
                share = self._share(step)
            most = int(_numbers(torch.tensor([room], device="cpu"), share))
            ids, scores, embed = self._step(ids, scores, free, (share, most), step, steps, embed)
            if progress is not None:
                progress(step + 1, steps)
        return ids

    def _share(self, step: int) -> float:
        times = torch.linspace(0, 1, self.how.timesteps)
        return masked_share(times, self.config.noise_schedule, self.config.schedule_power)[step].item()

    def _step(
        self,
        ids: Tensor,
        scores: Tensor,
        free: Tensor,
        share: tuple[float, int],
        step: int,
        steps: int,
        embed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mask what scores highest among the free places, and draw it anew; codes, new scores, hidden states.

        `share` is that of the free places, and how many these are in the image with the most.
        """
        left = (steps - 1 - step) / steps
        places, valid = _highest(scores, free, *share)
        known = ids
        ids = ids.masked_fill(_marked(places, valid, ids.shape[1]), self.net.num_tokens)
        hidden = self._look(self._twice(ids), None if embed is None else self._twice(embed))
        remask = self.how.can_remask_prev_masked and self.critic is None
        where = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if remask else places
        logits = self._logits(hidden, where, step)
        temperature = self.how.temperature * (1.0 if self.how.edit_iterations else left)
        drawn = self._draw(logits, where, step, temperature)
        shown = ids.gather(1, where)
        shown = torch.where(shown == self.net.num_tokens, drawn, shown)
        ids = known.scatter(1, where, torch.where(valid, shown, known.gather(1, where)) if not remask else shown)
        embed = hidden[: self.batch] if self.config.self_cond else None
        if self.critic is not None:
            return ids, self._critic_scores(ids, step, left), embed
        found = self._negative_confidence(logits, shown, where, step, left)
        # What was not masked stays for good, unless it may be masked again.
        scores = torch.full_like(scores, -1e5).scatter(1, where, found if remask else found.masked_fill(~valid, -1e5))
        return ids, scores, embed

    def _twice(self, rows: Tensor) -> Tensor:
        """Once for each branch of guidance."""
        return repeat(rows, "b ... -> (two b) ...", two=2) if self.guided else rows

    def _logits(self, hidden: Tensor, where: Tensor, step: int) -> Tensor:
        """Guided logits at some places, in single precision."""
        chosen = repeat(where, "b n -> (two b) n d", two=len(hidden) // self.batch, d=hidden.shape[-1])
        return self._guided(self.net.to_logits(hidden.gather(1, chosen)).float(), step)

    def _guided(self, logits: Tensor, step: int) -> Tensor:
        return self.how.guide(logits, step, self.how.steps) if self.guided else logits

    def _draw(self, logits: Tensor, places: Tensor, step: int, temperature: float) -> Tensor:
        if temperature == 0:
            return logits.argmax(dim=-1)
        vocab = logits.shape[-1]
        kept = max(math.ceil((1 - self.how.topk_filter_thres) * vocab), 1)
        if kept < vocab:
            logits, ids = logits.topk(kept, dim=-1)
        else:
            ids = torch.arange(vocab, device=logits.device).expand(logits.shape)
        logits = logits / temperature
        if self.how.top_p < 1:
            logits = top_p(logits, self.how.top_p)
        best = (logits + self.noise.gumbel(step, places, ids)).argmax(dim=-1, keepdim=True)
        return rearrange(ids.gather(-1, best), "b n 1 -> b n")

    def _negative_confidence(self, logits: Tensor, shown: Tensor, places: Tensor, step: int, left: float) -> Tensor:
        """How unlikely each shown code is, by the logits before temperature and filters."""
        chosen = rearrange(shown, "b n -> b n 1")
        if not self.how.choice_temperature:
            return 1 - rearrange(logits.softmax(dim=-1).gather(-1, chosen), "b n 1 -> b n")
        likely = rearrange(logits.log_softmax(dim=-1).gather(-1, chosen), "b n 1 -> b n")
        noise = self.noise.uniform(step, "choice", self.count).gather(1, places)
        return -(likely - torch.log(-torch.log(noise)) * self.how.choice_temperature * left)

    def _critic_scores(self, ids: Tensor, step: int, left: float) -> Tensor:
        """The critic's scores, guided like the codes."""
        assert self._judge is not None
        scores = self._guided(self._judge(self._twice(ids)).float(), step)
        noise = self.noise.uniform(step, "critic", ids.shape[1]) - 0.5
        return scores + noise * self.how.critic_noise_scale * left

    def _memories(
        self, net: Transformer, inputs: ConditioningInputs, negative_inputs: ConditioningInputs | None
    ) -> list[Memory]:
        """Keys and values for every layer, computed once: of what is told, then of what is guided away from.

        Rows without any context, which is what guidance away from nothing has, need no memory at all.
        """
        context = net.context(inputs)
        if not self.guided:
            return net.transformer_blocks.memories(context)
        if negative_inputs is not None:
            other = net.context(negative_inputs)
        elif net.lowres is not None:
            other = net.text_hidden(context, torch.zeros_like(context.mask[:, 0]))
        else:
            return net.transformer_blocks.memories(context)
        width = max(context.states.shape[1], other.states.shape[1])
        both = [_widened(part, width) for part in (context, other)]
        states, mask = (torch.cat(parts) for parts in zip(*both, strict=True))
        return net.transformer_blocks.memories(Context(states, mask))


def _widened(context: Context, width: int) -> Context:
    more = width - context.states.shape[1]
    return Context(F.pad(context.states, (0, 0, 0, more)), F.pad(context.mask, (0, more), value=False))


def _numbers(room: Tensor, share: float) -> Tensor:
    """How many of so many free places to mask: a share, but at least one where there is any."""
    return (room.float() * share).long().clamp(min=1).minimum(room)


def _highest(scores: Tensor, free: Tensor, share: float, most: int) -> tuple[Tensor, Tensor]:
    """The places to mask, and which of them count: images whose free regions differ mask different numbers."""
    numbers, most = _numbers(free.sum(dim=1), share), max(most, 1)
    places = scores.masked_fill(~free, -torch.inf).topk(most, dim=1).indices
    return places, torch.arange(most, device=scores.device) < rearrange(numbers, "b -> b 1")


def _marked(places: Tensor, valid: Tensor, count: int) -> Tensor:
    """True at the valid places."""
    return torch.zeros(len(places), count, dtype=torch.bool, device=places.device).scatter(1, places, valid)
