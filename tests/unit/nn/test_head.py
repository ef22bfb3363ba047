"""The output head against torch's own operations."""

import pytest
import torch
import torch.nn.functional as F

from tokscale.base import rng
from tokscale.nn import head as head_module
from tokscale.nn.head import VocabularyHead

VOCAB, DIM = 37, 8


@pytest.fixture
def head() -> VocabularyHead:
    with rng.scope(0, "head"):
        return VocabularyHead(DIM, VOCAB)


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(2, 150, DIM, generator=rng.generator(0, "hidden")).requires_grad_()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 150), generator=rng.generator(0, "labels"))


@pytest.mark.parametrize("chunk", [1 << 22, 64 * VOCAB], ids=["one chunk", "five chunks"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"label_smoothing": 0.1}], ids=str)
def test_chunked_loss_and_gradients_equal_cross_entropy(options, hidden, labels, chunk, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", chunk)
    with rng.scope(0, "head"):
        head = VocabularyHead(DIM, VOCAB, **options)
    logits = F.linear(hidden, head.weight, head.bias).flatten(0, 1)
    wanted = F.cross_entropy(logits, labels.flatten(), label_smoothing=head.label_smoothing)
    inputs = (hidden, *head.parameters())
    wanted_grads = torch.autograd.grad(3 * wanted, inputs)
    loss, _ = head(hidden, labels)
    grads = torch.autograd.grad(3 * loss, inputs)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for grad, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [1 << 22, 64 * VOCAB], ids=["one chunk", "five chunks"])
def test_without_a_bias_it_is_cross_entropy_too(hidden, labels, chunk, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", chunk)
    head = VocabularyHead(DIM, VOCAB, bias=False)
    wanted = F.cross_entropy(F.linear(hidden, head.weight).flatten(0, 1), labels.flatten())
    grads = torch.autograd.grad(head(hidden, labels)[0], (hidden, head.weight))
    for grad, want in zip(grads, torch.autograd.grad(wanted, (hidden, head.weight)), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight)) and len(list(head.parameters())) == 1


@pytest.mark.parametrize("chunk", [1 << 22, 64 * VOCAB], ids=["one chunk", "five chunks"])
def test_weights_say_how_much_each_position_counts(head, hidden, labels, chunk, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", chunk)
    weights = torch.rand(2, 150, generator=rng.generator(0, "weights"))
    weights[:, ::4] = 0
    rows = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none").unflatten(0, (2, 150))
    wanted = (rows * weights).sum() / weights.sum()
    inputs = (hidden, head.weight, head.bias)
    wanted_grads = torch.autograd.grad(wanted, inputs)
    scored = head(hidden, labels, weights)
    torch.testing.assert_close(scored.loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(scored.nll, rows.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(scored.hits, head(hidden).argmax(-1) == labels)
    for grad, want in zip(torch.autograd.grad(scored.loss, inputs), wanted_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [1 << 22, 64 * VOCAB], ids=["one chunk", "five chunks"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_distributions_are_targets_in_place_of_labels(hidden, labels, chunk, smoothing, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", chunk)
    with rng.scope(0, "head"):
        head = VocabularyHead(DIM, VOCAB, label_smoothing=smoothing)
    target_probs = torch.rand(2, 150, VOCAB, generator=rng.generator(0, "chances")).softmax(-1)
    weights = torch.rand(2, 150, generator=rng.generator(0, "weights"))
    logits = head(hidden).flatten(0, 1)
    rows = F.cross_entropy(logits, target_probs.flatten(0, 1), reduction="none", label_smoothing=smoothing)
    wanted = (rows * weights.flatten()).sum() / weights.sum()
    inputs = (hidden, head.weight, head.bias)
    wanted_grads = torch.autograd.grad(wanted, inputs)
    scored = head(hidden, labels, weights, target_probs)
    torch.testing.assert_close(scored.loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(scored.nll, rows.unflatten(0, (2, 150)).detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(scored.hits, head(hidden).argmax(-1) == labels)
    for grad, want in zip(torch.autograd.grad(scored.loss, inputs), wanted_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)


def test_nothing_that_counts_is_no_loss(head, hidden, labels):
    loss = head(hidden, labels, torch.zeros(2, 150)).loss
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not head.weight.grad.any()


def test_accuracy_is_the_share_of_labels_ranked_first(head, hidden, labels):
    ranked_first = F.linear(hidden, head.weight, head.bias).argmax(-1)
    labels[:, ::3] = ranked_first[:, ::3]
    _, accuracy = head(hidden, labels)
    assert accuracy == (labels == ranked_first).float().mean()
    assert 0.33 < accuracy < 0.4


def test_loss_without_gradients_is_the_same_and_keeps_none(head, hidden, labels):
    loss, _ = head(hidden, labels)
    with torch.no_grad():
        again, _ = head(hidden, labels)
    assert again == loss and not again.requires_grad


def test_bfloat16_loss_is_summed_in_single_precision(head, hidden, labels):
    half = head.to(torch.bfloat16)
    states = hidden.detach().to(torch.bfloat16).requires_grad_()
    loss, _ = half(states, labels)
    loss.backward()
    wanted = F.cross_entropy(half(states).float().flatten(0, 1), labels.flatten())
    assert loss.dtype == torch.float32 and states.grad.dtype == half.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    wanted_grad = torch.autograd.grad(wanted, states)[0]
    torch.testing.assert_close(states.grad, wanted_grad, rtol=2e-2, atol=1e-6)


def test_ids_are_embedded_and_states_projected_with_one_weight(head, hidden, labels):
    assert torch.equal(head(labels), head.weight[labels])
    assert torch.equal(head(hidden), F.linear(hidden, head.weight, head.bias))


def test_second_derivatives_are_refused(head, hidden, labels):
    loss, _ = head(hidden, labels)
    (grad,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_position_at_all_costs_nothing(head, hidden, labels):
    loss, accuracy = head(hidden[:, :0].reshape(0, DIM), labels[:, :0].flatten())
    loss.backward()
    assert loss == accuracy == 0 and not head.weight.grad.any()
