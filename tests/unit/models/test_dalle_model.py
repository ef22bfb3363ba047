"""DALL-E's loss: against the joint masked softmax, and what training options do to a batch."""

import pytest
import torch
import torch.nn.functional as F

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.errors import ConfigError, DataError
from tokscale.models.dalle import DALLE, DALLEConfig
from tokscale.models.registry import build_model

WORDS, TEXT, CODES, GRID = 11, 5, 13, (3, 4)


def make(**options: object) -> DALLE:
    sizes = {"num_text_tokens": WORDS, "text_seq_len": TEXT, "num_image_tokens": CODES, "image_grid": GRID}
    config = DALLEConfig(**{"dim": 16, "depth": 2, "heads": 2, "dim_head": 8} | sizes | options)  # type: ignore[arg-type]
    with rng.scope(0, "model"):
        return DALLE(config)


def make_batch(size: int = 3, first: int = 0) -> TokenBatch:
    stream = rng.generator(0, "batch")
    text = torch.randint(1, WORDS, (size, TEXT), generator=stream)
    text[0, 2:] = 0
    return TokenBatch(
        positions=torch.arange(first, first + size),
        text=text,
        text_mask=text != 0,
        codes=torch.randint(0, CODES, (size, *GRID), generator=stream),
    )


def joint_loss(model: DALLE, batch: TokenBatch) -> torch.Tensor:
    """The original's loss, read off the joint masked logits."""
    logits = model.logits(batch.text, batch.codes).transpose(1, 2)
    labels = torch.cat([model.text_ids(batch.text)[:, 1:], batch.codes.flatten(1) + WORDS + TEXT], dim=1)
    text = F.cross_entropy(logits[..., :TEXT], labels[:, :TEXT])
    image = F.cross_entropy(logits[..., TEXT:], labels[:, TEXT:])
    weight = model.config.loss_img_weight
    return (text + weight * image) / (weight + 1)


@pytest.mark.parametrize(
    "options", [{}, {"share_input_output_emb": True}, {"rotary_emb": False, "loss_img_weight": 2.0}, {"stable": True}]
)
def test_split_heads_equal_the_joint_masked_softmax(options):
    model, batch = make(**options), make_batch()
    wanted = joint_loss(model, batch)
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    out = model(batch)
    out.total.backward()
    torch.testing.assert_close(out.total, wanted, rtol=1e-6, atol=0)
    weighted = sum(out.weights[name] * part for name, part in out.parts.items())
    torch.testing.assert_close(out.total, weighted, rtol=1e-6, atol=0)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_padding_has_an_id_of_its_own_at_each_position():
    model = make()
    text = torch.tensor([[4, 9, 0, 0, 0]])
    assert model.text_ids(text).tolist() == [[0, 4, 9, WORDS + 2, WORDS + 3, WORDS + 4]]
    masked = model.text_ids(text, torch.tensor([[True, False, False, False, False]]))
    assert masked.tolist() == [[0, 4, WORDS + 1, WORDS + 2, WORDS + 3, WORDS + 4]]


def test_joint_logits_forbid_what_cannot_follow():
    model, batch = make(), make_batch()
    logits = model.logits(batch.text, batch.codes)
    lowest = torch.finfo(torch.float32).min
    assert logits.shape == (3, TEXT + 12, WORDS + TEXT + CODES)
    forbidden = logits == lowest
    assert forbidden[:, :TEXT, WORDS + TEXT :].all() and not forbidden[:, :TEXT, : WORDS + TEXT].any()
    assert forbidden[:, TEXT:, : WORDS + TEXT].all() and not forbidden[:, TEXT:, WORDS + TEXT :].any()


@pytest.mark.parametrize("seen", [0, 5, 12])
def test_logits_of_the_first_codes_are_those_of_all(seen):
    model, batch = make(), make_batch()
    codes = batch.codes.flatten(1)
    part = model.logits(batch.text, codes[:, :seen])
    torch.testing.assert_close(part, model.logits(batch.text, codes)[:, : part.shape[1]], rtol=1e-5, atol=1e-5)
    assert part.shape[1] == TEXT + min(seen + 1, 12)


def test_null_condition_leaves_the_batch_as_it_was():
    model, batch = make(null_cond_prob=1.0).train(), make_batch()
    before = batch.text.clone(), batch.text_mask.clone()
    dropped = model(batch).total
    assert torch.equal(batch.text, before[0]) and torch.equal(batch.text_mask, before[1])
    empty = TokenBatch(batch.positions, torch.zeros_like(batch.text), torch.zeros_like(batch.text_mask), batch.codes)
    assert dropped == make().eval()(empty).total != make().eval()(batch).total


def test_captions_are_dropped_by_position_alone_and_in_training_only():
    model, whole = make(null_cond_prob=0.4), make_batch(8, first=100)
    halves = [model(part).parts["text"] for part in whole.split(2)]
    torch.testing.assert_close(model(whole).parts["text"], sum(halves) / 2)
    assert model(whole).total == model(whole).total
    elsewhere = [model(make_batch(8, first=first)).total.item() for first in range(0, 80, 8)]
    assert len(set(elsewhere)) > 1
    assert model.eval()(whole).total == make().eval()(whole).total


def test_dropped_share_is_the_probability():
    kept = make(null_cond_prob=0.25).kept_captions(torch.arange(1000))
    assert 0.2 < 1 - kept.float().mean() < 0.3


def test_stable_survives_rows_without_a_positive_maximum():
    model = make(stable=True)
    for row in (torch.zeros(1, 1, 16), -torch.ones(1, 1, 16), torch.linspace(-3, -1, 16)[None, None]):
        model.stack.forward = lambda x, row=row, **_: row  # type: ignore[method-assign]
        out = model.read(torch.zeros(1, 1, 16))
        assert out.isfinite().all()
        torch.testing.assert_close(out, model.norm(row / row.abs().max().clamp(min=1e-30)))


def test_stable_shrinks_the_gradient_of_the_embeddings_tenfold():
    plain, stable, batch = make(), make(stable=True), make_batch()
    for model in (plain, stable):
        model.logits(batch.text, batch.codes).clamp(min=-100).sum().backward()
    ratio = stable.image_emb.weight.grad.norm() / plain.image_emb.weight.grad.norm()
    assert 0.05 < ratio < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_train(dtype):
    model, batch = make().to(dtype), make_batch()
    out = model(batch)
    out.total.backward()
    assert out.total.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.total.float(), make()(batch).total, rtol=2e-2, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_casting_the_model_leaves_positions_exact():
    model = make().to(torch.bfloat16)
    assert not list(model.buffers())


def test_wrong_lengths_and_grids_are_named():
    model, batch = make(), make_batch()
    with pytest.raises(DataError, match="captions of 4 ids for a model with text_seq_len=5"):
        model.text_ids(batch.text[:, :4])
    with pytest.raises(DataError, match=r"codes of shape \(3, 3\) for a model with image_grid=\(3, 4\)"):
        model.flat_codes(batch.codes[:, :, :3])


def test_registry_builds_the_model_of_a_config():
    model = build_model(make().config)
    assert type(model) is DALLE
    with pytest.raises(ConfigError, match="image_grid"):
        build_model(DALLEConfig(dim=16, depth=1))


def test_flops_follow_the_parameters():
    model = make(depth=4)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "stack" in name)
    positions = TEXT + 12
    heads = TEXT * model.text_head.weight.numel() + 12 * model.image_head.weight.numel()
    products = 6 * (positions * matrices + heads)
    assert products < model.train_flops() < 1.3 * products


def test_feedforward_width_may_be_a_fraction():
    model = make(ff_mult=2.5)
    assert model.stack.feedforwards[0].to_out.in_features == 40 and model(make_batch()).total.isfinite()


def test_ids_and_codes_of_any_integer_type_are_read_alike():
    model, batch = make(), make_batch()
    small = TokenBatch(batch.positions, batch.text.int(), batch.text_mask, batch.codes.int())
    assert model(small).total == model(batch).total
