"""From hidden states to one vocabulary: logits, or their cross-entropy without ever holding all of them."""

from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from tokscale.base.shapes import Bool, Float, Int, Num, Tensor
from tokscale.nn.regions import region

CHUNK_LOGITS = 1 << 22
"""Logits held at once by the loss: 16 MB in single precision."""
CHUNK_LOGITS_CUDA = 1 << 26
"""On a GPU, where every chunk is a dozen launches and a pass over the weight's gradient: 256 MB."""


class Scored(NamedTuple):
    """How well hidden states predict their labels, position by position; in single precision at least."""

    loss: Float[Tensor, ""]
    """Weighted mean cross-entropy (nats). The only part with a gradient."""
    nll: Float[Tensor, "*positions"]
    """That of each position."""
    hits: Bool[Tensor, "*positions"]
    """Where no entry was more likely than the label."""


class VocabularyHead(nn.Module):
    """The output projection of one vocabulary, which may be its input embedding too.

    Everything goes through `forward`, because an engine that shards parameters makes `weight` whole only while its
    owner runs; what to do follows from what is given.

    Args:
        dim: Width of the hidden states.
        vocab: Number of entries.
        tied: Whether the weight is an embedding too, which spares it weight decay.
        bias: Whether logits have a bias; embeddings have none.
        label_smoothing: Share of each label that the loss spreads evenly over the vocabulary.
    """

    def __init__(self, dim: int, vocab: int, *, tied: bool = False, bias: bool = True, label_smoothing: float = 0.0):
        super().__init__()
        bound = dim**-0.5  # as nn.Linear, where the original starts
        self.weight = nn.Parameter(torch.empty(vocab, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(vocab).uniform_(-bound, bound)) if bias else None
        self.label_smoothing = label_smoothing
        self.tied = self.no_decay = tied

    @overload
    def __call__(self, ids_or_hidden: Tensor) -> Tensor: ...

    @overload
    def __call__(self, ids_or_hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self, ids_or_hidden: Tensor, labels: Tensor, weights: Tensor, target_probs: Tensor | None = None
    ) -> Scored: ...

    def __call__(
        self,
        ids_or_hidden: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        target_probs: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | Scored:
        """See `forward`."""
        return super().__call__(ids_or_hidden, labels, weights, target_probs)

    def forward(
        self,
        ids_or_hidden: Num[Tensor, "*shape"],
        labels: Int[Tensor, "*positions"] | None = None,
        weights: Float[Tensor, "*positions"] | None = None,
        target_probs: Float[Tensor, "*positions vocab"] | None = None,
    ) -> Float[Tensor, "*out"] | tuple[Float[Tensor, ""], Float[Tensor, ""]] | Scored:
        """Embed ids; or project hidden states to logits; or, with labels, to their loss.

        Args:
            ids_or_hidden: Ids `[batch, seq]`, or hidden states `[batch, seq, dim]`.
            labels: The entry that follows each hidden state.
            weights: How much each position counts in the loss; 0 leaves it out.
            target_probs: With weights: the distribution that each position should have, in place of its label alone,
                which then only says what a hit is.

        Returns:
            Embeddings `[batch, seq, dim]`; or logits `[batch, seq, vocab]`; or the cross-entropy (nats) and the share
            of labels that were the most likely entry, both means over all positions, in single precision at least;
            zeros where there is no position at all. With weights, the weighted loss and what became of each position.
        """
        if not ids_or_hidden.is_floating_point():
            return F.embedding(ids_or_hidden, self.weight)
        if labels is None:
            return F.linear(ids_or_hidden, self.weight, self.bias)
        total, nll, hits = _CrossEntropy.apply(  # type: ignore[misc]  # torch does not type `apply`
            ids_or_hidden.flatten(0, -2),
            self.weight,
            self.bias,
            labels.flatten().long(),
            None if weights is None else weights.flatten(),
            None if target_probs is None else target_probs.flatten(0, -2),
            self.label_smoothing,
            torch.is_grad_enabled(),
        )
        if weights is None:
            count = max(labels.numel(), 1)
            return total / count, hits.to(total.dtype).sum() / count
        mass = weights.sum(dtype=total.dtype)
        loss = total / torch.where(mass > 0, mass, 1)
        return Scored(loss, nll.unflatten(0, labels.shape), hits.unflatten(0, labels.shape))


@region()
def score_chunk(
    logits: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, "rows 1"],
    shares: Float[Tensor, "rows 1"] | None,
    target_probs: Float[Tensor, "rows vocab"] | None,
    *,
    smoothing: float,
    with_grad: bool,
    with_bias: bool,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Losses and hits of some rows, and where asked for the gradient of their logits and its sum, that of the bias.

    The logits' memory is used for what follows from them.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak, target = logits.amax(-1, keepdim=True), logits.gather(-1, labels)
    hits = target == peak
    if target_probs is not None:
        target = (logits * target_probs).sum(-1, keepdim=True)
    if smoothing:
        target = torch.lerp(target, logits.mean(-1, keepdim=True), smoothing)
    scores = logits.sub_(peak).exp_()
    mass = scores.sum(-1, keepdim=True)
    losses = mass.log() + peak - target
    if not with_grad:
        return losses, hits, None, None
    grad = scores.div_(mass)
    if target_probs is not None:
        grad.sub_(target_probs, alpha=1 - smoothing)
    else:
        grad.scatter_add_(-1, labels, torch.full_like(target, smoothing - 1))
    if smoothing:
        grad -= smoothing / grad.shape[-1]
    if shares is not None:
        grad *= shares
    return losses, hits, grad.to(grad_dtype), grad.sum(0) if with_bias else None


class _CrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies over rows, in chunks of rows whose gradient is taken while their logits are there.

    A chunk's logits live for one iteration: the peak is one chunk instead of three copies of `rows x vocab`, and the
    backward pass only scales what is ready. Statistics and sums are in single precision at least.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shares: Tensor | None,
        target_probs: Tensor | None,
        smoothing: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total, nll = hidden.new_zeros((), dtype=exact), hidden.new_empty(len(hidden), dtype=exact)
        hits = torch.empty_like(labels, dtype=torch.bool)
        grads = []
        if with_grad:
            grads = [torch.empty_like(hidden), torch.zeros_like(weight, dtype=exact)]
            grads += [torch.zeros_like(bias, dtype=exact)] if bias is not None else []
        logits_at_once = CHUNK_LOGITS_CUDA if hidden.device.type == "cuda" else CHUNK_LOGITS
        rows = max(logits_at_once // weight.shape[0], 64)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            chunk = hidden[part]
            losses, hits_here, grad, grad_bias = score_chunk(
                F.linear(chunk, weight, bias),
                labels[part, None],
                None if shares is None else shares[part, None].to(exact),
                None if target_probs is None else target_probs[part],
                smoothing=smoothing,
                with_grad=with_grad,
                with_bias=bias is not None,
                grad_dtype=chunk.dtype,
            )
            nll[part], hits[part] = losses[:, 0], hits_here[:, 0]
            total += (losses if shares is None else losses * shares[part, None].to(exact)).sum()
            if grad is not None:
                grads[0][part] = grad @ weight
                grads[1] += grad.t() @ chunk
                if grad_bias is not None:
                    grads[2] += grad_bias
        kept = (hidden, weight) if bias is None else (hidden, weight, bias)
        ctx.save_for_backward(*(grad.to(like.dtype) for grad, like in zip(grads, kept, strict=False)))
        ctx.mark_non_differentiable(nll, hits)
        return total, nll, hits

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator loses the name of `ctx`
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = [grad * grad_outputs[0].to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, *[None] * (8 - len(grads))
