"""RQ-Transformer: codes to a loss, and conditions to codes (Lee et al. 2022, arXiv:2203.01941)."""

import math
from collections.abc import Mapping, Sequence

import torch

from tokscale.base.batch import SOFT_TARGETS, LossOutput, TokenBatch
from tokscale.base.errors import ConfigError
from tokscale.base.rng import uniform_at
from tokscale.base.rows import Rows, matching
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.models.common import drawing, told_rows
from tokscale.models.grids import Grid, GridsConfig
from tokscale.models.model import GenerativeModel
from tokscale.models.rqtransformer.config import HierarchicalConfig, RQSampling, RQTransformerConfig
from tokscale.models.rqtransformer.network import HierarchicalNetwork
from tokscale.models.rqtransformer.sample import sample_codes
from tokscale.nn.conditioning import Context


class HierarchicalCausalTransformer(HierarchicalNetwork, GenerativeModel):
    """The network with its loss and its way of sampling, for any number of stages.

    Args:
        config: Options; sizes must be known, see `HierarchyConfig.fitted`.
    """

    config_class = HierarchicalConfig
    reads_soft_codes = True
    sampling_config = RQSampling

    @property
    def text_seq_len(self) -> int:
        """Width of the caption ids."""
        return self.config.text_seq_len

    def forward(self, batch: TokenBatch) -> LossOutput:
        """The loss of one micro batch: the mean cross-entropy of all codes that are not `pad_id`.

        Where `extra` holds `SOFT_TARGETS`, those distributions are the targets (section 3.2.3 of the paper).
        In training, `cond_drop_prob` of the samples do not see their condition; which ones follows from their positions
        alone. The batch itself is never changed.
        """
        context = self.context(batch.text, batch.text_mask, batch.extra)
        if context is not None and self.training:
            context = context.only(self.kept_conditions(batch.positions))
        grid = self.config.grid_of(batch.codes) if isinstance(self.config, GridsConfig) and self.grids else None
        codes = self.structured(batch.codes)
        real = codes != self.config.pad_id
        target_probs = batch.extra.get(SOFT_TARGETS)
        if target_probs is not None:
            target_probs = target_probs.flatten(1, -2).unflatten(1, codes.shape[1:])
        scored = self.head(self.hidden(codes, context, grid), codes.where(real, 0), real.float(), target_probs)
        metrics = {"accuracy": _mean(scored.hits, real)}
        for level in range(codes.shape[-1]):
            metrics[f"loss_level_{level + 1}"] = _mean(scored.nll[..., level], real[..., level])
        return LossOutput(total=scored.loss, parts={"codes": scored.loss}, weights={"codes": 1.0}, metrics=metrics)

    def context(
        self,
        text: Int[Tensor, "batch text"],
        text_mask: Bool[Tensor, "batch text"],
        extra: Mapping[str, Tensor] | None = None,
    ) -> Context | None:
        """What the condition says, if the model has one.

        Raises:
            DataError: When the batch lacks it.
        """
        conditioning = self.opening.conditioning
        return None if conditioning is None else conditioning(text, text_mask, extra or {})

    def kept_conditions(self, positions: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Which samples see their condition in training."""
        return uniform_at(positions, 0, "rqtransformer", "cond_drop") >= self.config.cond_drop_prob

    def rows(self) -> dict[str, tuple[Rows, ...]]:
        """See `Model.rows`."""
        config = self.config
        codes = Rows("codes", (config.codes,))
        heads = {f"head.{part}": (codes,) for part in ("weight", "bias")}
        tables = {"code_emb.weight": (codes,) * (1 if config.shared_code_emb else self.lengths[-1])}
        grid = config.first_grid
        first = {"stages.0.positions.weight": (Rows("plane", grid),)} if grid is not None else {}
        meanings = told_rows(config) | heads | tables | first
        for number, length in enumerate(self.lengths):
            meanings.setdefault(f"stages.{number}.positions.weight", (Rows("places", (length,)),))
        if config.prefix:
            meanings["opening.absent"] = (Rows("places", (config.prefix,)),)
        return matching([name for name, _ in self.named_parameters()], meanings)

    def train_flops(self) -> float:
        """Floating-point operations of one sample's forward and backward pass."""
        return 3 * self.forward_flops()

    def generate_codes(
        self,
        text: Int[Tensor, "batch text"],
        text_mask: Bool[Tensor, "batch text"],
        *,
        options: RQSampling,
        seeds: Sequence[int],
        extra: Mapping[str, Tensor] | None = None,
        grid: Grid | None = None,
        prime: Int[Tensor, "batch *primed"] | None = None,
    ) -> Int[Tensor, "batch *code_shape"]:
        """Draw the codes of one image per caption.

        Args:
            text: Caption ids, 0 where padded; without a condition, their number is all that counts.
            text_mask: True at real tokens.
            options: How to draw.
            seeds: One per caption: with its own seed, a caption draws the same noise in whatever batch it stands.
            extra: Embeddings or labels, where the model is conditioned on them.
            grid: Rows and columns to draw, where the model knows several.
            prime: The first codes, in raster order and level by level.

        Raises:
            ConfigError: When seeds do not match the captions, options the levels, priming leaves nothing to draw, or
                the model does not know the grid.
        """
        options.check(self.lengths[-1])
        with drawing(self, seeds, text):
            if isinstance(self.config, GridsConfig) and (self.grids or grid is not None):
                grid = self.config.asked_grid(grid)
            lengths = self.lengths_of(grid)
            size = math.prod(lengths)
            known = text.new_zeros(len(text), 0) if prime is None else prime.flatten(1).long()
            if len(known) != len(text) or known.shape[1] >= size:
                raise ConfigError(
                    f"prime: {tuple(known.shape)} codes for {len(text)} images of {size}; give fewer than all"
                )
            codes = sample_codes(self, self.context(text, text_mask, extra), known, options, seeds, grid)
        return codes.unflatten(1, self.config.code_shape if grid is None else (*grid, *lengths[1:]))

    def generate(
        self,
        prime: Int[Tensor, "batch *primed"] | None = None,
        *,
        batch: int = 1,
        options: RQSampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Int[Tensor, "batch *code_shape"]:
        """The original's call, for models without a condition: go on from `prime`, or draw `batch` images."""
        count = batch if prime is None else len(prime)
        text = torch.zeros(count, self.text_seq_len, dtype=torch.long, device=self.opening.start.device)
        return self.generate_codes(
            text,
            text != 0,
            options=options or RQSampling(),
            seeds=seeds if seeds is not None else range(count),
            prime=prime,
        )


class RQTransformer(HierarchicalCausalTransformer):
    """Two stages: places of an image in raster order, and the codes of each."""

    config_class = RQTransformerConfig
    config: RQTransformerConfig

    def __init__(self, config: RQTransformerConfig):
        super().__init__(config)


def _mean(values: Tensor, real: Tensor) -> Float[Tensor, ""]:
    return (values * real).sum() / real.sum().clamp(min=1)
