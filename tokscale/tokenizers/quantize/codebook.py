"""Learned codebooks: one, or a residual cascade of several levels."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tokscale.base import rng
from tokscale.base.protocols import Collectives, current
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.tokenizers.quantize.base import (
    Quantized,
    TrainedQuantizer,
    assigned,
    codebook_usage,
    exact,
    nearest,
    straight_through,
)
from tokscale.tokenizers.quantize.config import ResidualConfig, VQConfig
from tokscale.tokenizers.quantize.entropy import entropy_loss

Maps = Float[Tensor, "batch dim grid_h grid_w"]


class CodebookQuantizer(TrainedQuantizer):
    """The nearest entry of a codebook; with several levels, of what the levels before left over.

    With `update: ema` the entries are buffers: no engine casts, divides or trains them, and since their statistics are
    sums over all ranks they stay equal on every rank. With `update: loss` they are one parameter.
    """

    no_decay = True
    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor

    def __init__(self, config: VQConfig | ResidualConfig):
        super().__init__()
        self.config = config
        self.num_tokens, self.dim = config.num_tokens, config.dim
        self.levels, self.cosine, self.codebooks = config.code_levels, config.cosine, config.codebooks
        self.step = 0
        start = torch.randn(self.codebooks, config.num_tokens, config.dim) / config.dim**0.5
        if config.update == "loss":
            self.codebook = nn.Parameter(start)
            return
        self.register_buffer("codebook", start)
        self.register_buffer("ema_count", torch.zeros(self.codebooks, config.num_tokens))
        self.register_buffer("ema_sum", torch.zeros_like(start))

    def forward(self, features: Maps) -> Quantized:
        """See `TrainedQuantizer`. The commitment of a cascade is over its partial sums, as in the RQ-VAE paper."""
        config = self.config
        with exact(features.device):
            rows, codebooks = self._rows(features), self.entries()
            codes, residuals, sums = self._quantize_levels(rows, codebooks)
            parts = {"commitment": torch.stack([F.mse_loss(rows, total.detach()) for total in sums]).mean()}
            weights = {"commitment": config.commitment_weight}
            if config.update == "loss":
                parts["codebook"] = torch.stack([F.mse_loss(total, rows.detach()) for total in sums]).mean()
                weights["codebook"] = config.codebook_weight
            if config.entropy_weight:
                # -|row - entry|^2 up to a term that is the same for all entries, which the softmax does not see. Of a
                # copy, since the averages move before the backward pass comes.
                entries = codebooks[0] if config.update == "loss" else codebooks[0].clone()
                logits = (2 * rows @ entries.T - entries.square().sum(dim=1)) / config.entropy_temperature
                parts["entropy"] = entropy_loss(logits)
                weights["entropy"] = config.entropy_weight
            if self.training and config.update == "ema":
                self._ema_update(codes, residuals)
            vectors = _maps(straight_through(rows, sums[-1]), features)
            return Quantized(vectors, self._shaped(codes, features), parts, weights)

    @torch.no_grad()
    def ids(self, features: Maps) -> Int[Tensor, "batch *code_shape"]:
        """Codes of features."""
        with exact(features.device):
            return self._shaped(self._quantize_levels(self._rows(features), self.entries())[0], features)

    def lookup(self, codes: Int[Tensor, "batch *code_shape"]) -> Maps:
        """Sum of the levels' entries."""
        codebooks = self.entries()
        levels = codes if self.levels else codes[..., None]
        vectors = [F.embedding(levels[..., at], self._book(codebooks, at)) for at in range(levels.shape[-1])]
        return rearrange(torch.stack(vectors).sum(dim=0), "b h w d -> b d h w")

    def usage(self, codes: Int[Tensor, "batch *code_shape"]) -> dict[str, Float[Tensor, ""]]:
        """Over the entries of all codebooks together."""
        if self.codebooks == 1:
            return codebook_usage(codes, self.num_tokens)
        offsets = torch.arange(self.codebooks, device=codes.device) * self.num_tokens
        return codebook_usage(codes + offsets, self.codebooks * self.num_tokens)

    def anneal(self, step: int) -> None:
        """Take note of the optimizer step: every few of them the dead are looked for."""
        self.step = step

    def _rows(self, features: Maps) -> Float[Tensor, "rows dim"]:
        rows = rearrange(features.float(), "b d h w -> (b h w) d")
        return F.normalize(rows, dim=-1) if self.cosine else rows

    def entries(self) -> Float[Tensor, "books vocab dim"]:
        """The codebooks, as they are compared and summed: one for each level, or one for all."""
        return F.normalize(self.codebook.float(), dim=-1) if self.cosine else self.codebook.float()

    def _book(self, codebooks: Float[Tensor, "books vocab dim"], level: int) -> Float[Tensor, "vocab dim"]:
        return codebooks[level % self.codebooks]

    def _quantize_levels(
        self, rows: Float[Tensor, "rows dim"], codebooks: Float[Tensor, "books vocab dim"]
    ) -> tuple[Int[Tensor, "rows levels"], list[Tensor], list[Tensor]]:
        """Codes, what each level had before it, and the sums of entries up to each level."""
        residual, total = rows.detach(), torch.zeros_like(rows)
        codes, residuals, sums = [], [], []
        for level in range(self.levels or 1):
            book = self._book(codebooks, level)
            codes.append(nearest(residual, book.detach()))
            vectors = F.embedding(codes[-1], book)
            residuals.append(residual)
            residual, total = residual - vectors.detach(), total + vectors
            sums.append(total)
        return torch.stack(codes, dim=1), residuals, sums

    def _shaped(self, codes: Int[Tensor, "rows levels"], features: Maps) -> Int[Tensor, "batch *code_shape"]:
        sizes = dict(zip("hw", features.shape[-2:], strict=True))
        codes = rearrange(codes, "(b h w) l -> b h w l", **sizes)
        return codes if self.levels else codes[..., 0]

    # ---------------------------------------------------------------------------------------- moving averages

    @torch.no_grad()
    def _ema_update(self, codes: Int[Tensor, "rows levels"], residuals: list[Tensor]) -> None:
        # By place and then by level: so the batches of all ranks in rank order are one list, however many ranks.
        rows = rearrange(torch.stack(residuals), "(l k) n d -> k (n l) d", k=self.codebooks)
        ids = rearrange(codes, "n (l k) -> k (n l)", k=self.codebooks)
        found = torch.stack([assigned(part, index, self.num_tokens) for part, index in zip(rows, ids, strict=True)])
        found = current(Collectives).all_sum(found)
        count = self.ema_count.lerp(found[..., 0], 1 - self.config.decay)
        total = self.ema_sum.lerp(found[..., 1:], 1 - self.config.decay)
        entries = torch.where(count[..., None] > 1e-6, total / count.clamp_min(1e-6)[..., None], self.codebook)
        if self.config.revives and self.step % self.config.revive_every == 0:
            count, total, entries = self._restart_dead_codes(rows, count, total, entries)
        if self.cosine:
            entries = F.normalize(entries, dim=-1)
        # An engine drops a step whose loss is not finite; then the averages must not have seen it either.
        fine = found.isfinite().all()
        for buffer, value in ((self.ema_count, count), (self.ema_sum, total), (self.codebook, entries)):
            buffer.copy_(torch.where(fine, value, buffer))

    def _restart_dead_codes(
        self,
        rows: Float[Tensor, "books rows dim"],
        count: Float[Tensor, "books vocab"],
        total: Float[Tensor, "books vocab dim"],
        entries: Float[Tensor, "books vocab dim"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Move the dead to features drawn from all ranks' rows; what is drawn depends on the step alone."""
        share = count.mean(dim=1, keepdim=True)
        dead = count < self.config.revives * share
        places = torch.arange(dead.numel(), device=dead.device) + self.step * dead.numel()
        draw = rng.uniform_at(places, 0, "revive").view_as(dead)
        own = rows.shape[1]
        others = current(Collectives)
        every = others.all_sum(torch.full((), float(own), device=rows.device))
        index = (draw * every).long() - others.rank_offset(own)
        here = (index >= 0) & (index < own)
        picked = torch.stack([part[at] for part, at in zip(rows, index.clamp(0, own - 1), strict=True)])
        picked = others.all_sum(torch.where(here[..., None], picked, 0.0))
        count = torch.where(dead, share, count)
        total = torch.where(dead[..., None], picked * share[..., None], total)
        return count, total, torch.where(dead[..., None], picked, entries)


def _maps(rows: Float[Tensor, "rows dim"], like: Maps) -> Maps:
    return rearrange(rows, "(b h w) d -> b d h w", h=like.shape[-2], w=like.shape[-1])
