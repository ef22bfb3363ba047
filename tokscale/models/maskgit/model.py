"""MaskGIT: codes and what is told beside them to a loss, and what is told to codes (arXiv:2202.04200, 2301.00704)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import assert_never

import torch
from einops import rearrange

from tokscale.base.batch import LossOutput, TokenBatch
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.rows import Rows, matching
from tokscale.base.shapes import Bool, Int, Tensor
from tokscale.models.common import drawing, told_rows
from tokscale.models.grids import Grid
from tokscale.models.maskgit.config import MaskGitConfig, MaskGitSampling
from tokscale.models.maskgit.critic import SelfCritic, critic_input, critic_logits, critic_loss
from tokscale.models.maskgit.layers import may_select
from tokscale.models.maskgit.masking import Draws, masks, sample_training_draws
from tokscale.models.maskgit.network import ConditioningEncoder, ConditioningInputs, Transformer
from tokscale.models.maskgit.sample import EditInputs, Noise, Sampler, SeededNoise, negative_of
from tokscale.models.maskgit.schedule import expected_masked
from tokscale.models.model import GenerativeModel
from tokscale.nn.conditioning import Context


class MaskGit(GenerativeModel):
    """The generator, its critic if there is one, its loss and its ways of sampling.

    The image tokenizer is not part of it: training reads codes, and sampling returns codes.

    Args:
        config: Options; sizes must be known, see `MaskGitConfig.fitted`.
    """

    config_class = MaskGitConfig
    sampling_config = MaskGitSampling
    parallel_decoding = True

    def __init__(self, config: MaskGitConfig):
        super().__init__()
        _, self.grid = config.sizes
        self.config = config
        self.reader = ConditioningEncoder(config)
        width = self.reader.width
        self.transformer = Transformer(config, config, width, self_cond=config.self_cond, add_mask_id=True)
        self.token_critic: Transformer | SelfCritic | None = None
        if config.token_critic is not None:
            self.token_critic = Transformer(config, config.token_critic, width, dim_out=1)
        elif config.self_token_critic:
            self.token_critic = SelfCritic(config.dim)
        if config.train_only_critic:
            self.reader.requires_grad_(False)
            self.transformer.requires_grad_(False)
        if config.train_only_generator and self.token_critic is not None:
            self.token_critic.requires_grad_(False)

    @property
    def text_seq_len(self) -> int:
        """Width of the caption ids."""
        return self.config.text_seq_len

    def forward(self, batch: TokenBatch) -> LossOutput:
        """The loss of one micro batch. What is masked, dropped and drawn follows from the samples' positions alone."""
        rows, columns = self.config.grid_of(batch.codes)
        count = rows * columns
        return self.loss(batch, sample_training_draws(self.config, batch.positions, count, training=self.training))

    def loss(self, batch: TokenBatch, draws: Draws) -> LossOutput:
        """The loss under given choices.

        Raises:
            DataError: When the codes are of another grid, or something the model is told is missing.
        """
        config, codes, grid = self.config, self.flat_codes(batch.codes), self.config.grid_of(batch.codes)
        predicted, hidden = masks(config, draws, codes.shape[1])
        masked = torch.where(hidden, self.transformer.num_tokens, codes)
        with torch.no_grad() if config.train_only_critic else nullcontext():
            inputs = self.reader(batch.text, batch.text_mask, batch.extra)
            context = self.transformer.context(inputs)
            seen = self.transformer.text_hidden(context, draws.keep_condition)
            look = self._first_look(masked, context, draws, grid)
            places = predicted if may_select(codes) else None
            states = self.transformer(masked, seen, look, places, grid)
            mean, accuracy = self._scores(states, codes, predicted, selected=places is not None)
        generator = mean * self._share(predicted, mean.dtype)
        parts, metrics = {"generator": generator}, {"accuracy": accuracy, "token_loss": mean.detach()}
        if self.token_critic is None or config.train_only_generator:
            return LossOutput(total=generator, parts=parts, weights={"generator": 1.0}, metrics=metrics)
        filled, wrong = critic_input(codes, masked, self._drawn(states, draws, predicted, masked), hidden)
        critic, right = self._critic_loss(filled, wrong, inputs, context, draws, grid)
        weight = config.critic_loss_weight
        return LossOutput(
            total=weight * critic if config.train_only_critic else generator + weight * critic,
            parts=parts | {"critic": critic},
            weights={"generator": 0.0 if config.train_only_critic else 1.0, "critic": weight},
            metrics=metrics | {"critic_accuracy": right},
        )

    def _first_look(self, masked: Tensor, context: Context, draws: Draws, grid: Grid) -> Tensor | None:
        """Hidden states to feed back. Every rank looks, whatever it keeps: the look is a collective under ZeRO-3."""
        if not self.config.self_cond:
            return None
        with torch.no_grad():
            return self.transformer(masked, context, grid=grid) * rearrange(draws.use_self_cond, "b -> b 1 1")

    def _scores(self, states: Tensor, codes: Tensor, predicted: Tensor, *, selected: bool) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy at the predicted places, from states of these alone (`selected`) or of all."""
        if selected:
            return self.transformer.to_logits(states, codes[predicted])
        counts = predicted.float()
        scored = self.transformer.to_logits(states, codes, counts)
        return scored.loss, (scored.hits * counts).sum() / counts.sum()

    def _share(self, predicted: Tensor, dtype: torch.dtype) -> float | Tensor:
        """From the mean over this micro batch's masked codes to the sum over them by their expected number."""
        config = self.config
        match config.loss_mean:
            case "tokens":
                return 1.0
            case "expected":
                count = predicted.shape[1]
                expected = expected_masked(count, config.noise_schedule, config.schedule_power, config.min_masking_rate)
                return (predicted.sum().double() / (len(predicted) * expected)).to(dtype)
            case _:
                assert_never(config.loss_mean)

    @torch.no_grad()
    def _drawn(self, states: Tensor, draws: Draws, predicted: Tensor, masked: Tensor) -> Tensor:
        """Codes that the generator draws at the predicted places, each sample at its own temperature.

        Elsewhere `masked`, or where all places have states, codes that nobody asked for.
        """
        logits = self.transformer.to_logits(states).float()
        selected = logits.dim() == 2
        temperatures = rearrange(draws.temperatures.clamp(min=1e-10), "b -> b 1").to(logits.dtype)
        temperatures = temperatures.expand(predicted.shape)[predicted] if selected else temperatures
        noise = draws.gumbel(predicted if selected else None, logits.shape[-1])
        drawn = (logits / rearrange(temperatures, "... -> ... 1") + noise).argmax(dim=-1)
        return masked.masked_scatter(predicted, drawn) if selected else drawn

    def _critic_loss(
        self, filled: Tensor, wrong: Tensor, inputs: ConditioningInputs, context: Context, draws: Draws, grid: Grid
    ) -> tuple[Tensor, Tensor]:
        assert self.token_critic is not None
        owner = self.token_critic if isinstance(self.token_critic, Transformer) else self.transformer
        context = owner.context(inputs) if owner is self.token_critic else context
        seen = owner.text_hidden(context, draws.critic_keep_condition)
        return critic_loss(critic_logits(self.token_critic, self.transformer, filled, seen, grid), wrong)

    def flat_codes(self, codes: Int[Tensor, "batch *code_shape"]) -> Int[Tensor, "batch image"]:
        """All codes of each image in raster order.

        Raises:
            DataError: When there are more or fewer than the grid holds, the model knows several and not this one, or
                they are images.
        """
        if codes.is_floating_point():
            raise DataError(f"codes of {codes.dtype}: images become codes by a tokenizer first, see `token_batch`")
        flat, (rows, columns) = codes.flatten(1), self.config.grid_of(codes)
        if flat.shape[1] != rows * columns:
            raise DataError(f"codes of shape {tuple(codes.shape[1:])} for a model with image_grid={(rows, columns)}")
        return flat

    def rows(self) -> dict[str, tuple[Rows, ...]]:
        """See `Model.rows`."""
        codes, grid = self.config.sizes
        meanings = told_rows(self.config) | {
            "transformer.token_emb.weight": (Rows("codes", (codes,)), Rows("places", (1,))),
            "transformer.pos_emb.weight": (Rows("plane", grid),),
            "transformer.to_logits.weight": (Rows("codes", (codes,)),),
            "token_critic.token_emb.weight": (Rows("codes", (codes,)),),
            "token_critic.pos_emb.weight": (Rows("plane", grid),),
        }
        return matching([name for name, _ in self.named_parameters()], meanings)

    def train_flops(self) -> float:
        """Floating-point operations of one sample's forward and backward pass; of several grids, the mean."""
        counts = [rows * columns for rows, columns in self.config.grids]
        return sum(map(self._train_flops, counts)) / len(counts)

    def _train_flops(self, count: int) -> float:
        config, transformer = self.config, self.transformer
        words = config.condition.length(config.text_seq_len)
        look = transformer.forward_flops(words, count=count)
        masked = expected_masked(count, config.noise_schedule, config.schedule_power, config.min_masking_rate)
        flops = 3 * transformer.forward_flops(words, masked / count, count)
        flops += 3 * 2 * masked * config.dim * transformer.num_tokens
        flops += 3 * self.reader.conditioning.forward_flops()
        flops += look if config.self_cond else 0
        if self.token_critic is not None and not config.train_only_generator:
            flops += 3 * (
                self.token_critic.forward_flops(words, count=count)
                if isinstance(self.token_critic, Transformer)
                else look
            )
        return flops

    def sampler(
        self,
        how: MaskGitSampling,
        inputs: ConditioningInputs,
        negative_inputs: ConditioningInputs | None,
        noise: Noise,
        grid: Grid | None = None,
    ) -> Sampler:
        """What draws codes; `generate_codes` gives it seeded noise."""
        return Sampler(
            self.config,
            self.transformer,
            self.token_critic,
            how=how,
            inputs=inputs,
            negative_inputs=negative_inputs,
            noise=noise,
            grid=self.config.asked_grid(grid),
        )

    def generate_codes(
        self,
        text: Int[Tensor, "batch text"],
        text_mask: Bool[Tensor, "batch text"],
        *,
        options: MaskGitSampling,
        seeds: Sequence[int],
        extra: Mapping[str, Tensor] | None = None,
        grid: Grid | None = None,
        codes: Int[Tensor, "batch grid_h grid_w"] | None = None,
        redraw: Bool[Tensor, "batch grid_h grid_w"] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Int[Tensor, "batch grid_h grid_w"]:
        """Draw the codes of one image per caption.

        Args:
            text: Caption ids, 0 where padded.
            text_mask: True at real tokens.
            options: How to draw.
            seeds: One per caption: with its own seed, a caption draws the same noise in whatever batch it stands.
            extra: What the model is told beside captions. Entries whose names begin with `negative.` say what to be
                guided away from: `negative.text` and `negative.text_mask`, or `negative.text_embeds` and its mask.
            grid: Rows and columns to draw, where the model knows several; those of `codes` where these are given.
            codes: Of images to edit.
            redraw: True at codes to draw anew, with `codes`; the others stay (inpainting, outpainting).
            progress: Called with the step and the number of steps after each one.

        Raises:
            ConfigError: When seeds do not match the captions, or editing options do not fit together.
            DataError: When something that the model is told is missing.
        """
        extra = extra or {}
        with drawing(self, seeds, text):
            flat = None if codes is None else self.flat_codes(codes)
            grid = self.config.asked_grid(grid if codes is None else self.config.grid_of(codes))
            edit = EditInputs.of(flat, None if redraw is None else redraw.flatten(1), options)
            inputs = self.reader(text, text_mask, extra)
            negative = negative_of(extra, text)
            if negative is None and options.negative_prompt is not None:
                raise ConfigError(
                    "sampling.negative_prompt is a caption, and this model reads ids: give extra['negative.text'], or "
                    "sample from an export, which does so"
                )
            against = None if negative is None else self.reader(*negative)
            noise = SeededNoise(seeds, options.steps, text.device)
            drawn = self.sampler(options, inputs, against, noise, grid).run(edit, progress)
        return rearrange(drawn, "b (h w) -> b h w", h=grid[0])
