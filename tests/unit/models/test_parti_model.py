"""Parti's network and loss: what it starts from, what it sees, and that every option does something."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokscale.base import rng
from tokscale.base.batch import TEXT_EMBEDS, TEXT_EMBEDS_MASK, ImageBatch, TokenBatch
from tokscale.base.errors import ConfigError, DataError
from tokscale.engine.groups import parameter_groups
from tokscale.models.common import token_batch
from tokscale.models.parti import Parti, PartiConfig
from tokscale.models.registry import build_model
from tokscale.nn.conditioning import CaptionConfig, EmbeddingsConfig

WORDS, TEXT, CODES, GRID, WIDTH = 11, 5, 13, (3, 4), 12
IMAGE = GRID[0] * GRID[1]
CAPTION = CaptionConfig(depth=1, heads=2, dim_head=8)
ORIGINAL = {"condition": EmbeddingsConfig(width=WIDTH)}
PAPER = {
    "condition": CAPTION,
    "rel_pos_bias": False,
    "multi_query": False,
    "attn_types": ("conv_like",),
    "kernel_size": 3,
    "ff_norm": False,
    "sandwich_norm": True,
}
ARCHITECTURES = {"original": ORIGINAL, "paper": PAPER}


def make(**options: object) -> Parti:
    sizes = {"num_text_tokens": WORDS, "max_text_len": TEXT, "num_image_tokens": CODES, "image_grid": GRID}
    config = PartiConfig(**{"dim": 16, "depth": 2, "heads": 2, "dim_head": 8} | sizes | ORIGINAL | options)  # type: ignore[arg-type]
    with rng.scope(0, "model"):
        return Parti(config)


def make_batch(size: int = 3, first: int = 0) -> TokenBatch:
    stream = rng.generator(0, "batch")
    text = torch.randint(1, WORDS, (size, TEXT), generator=stream)
    text[0, 2:] = 0
    return TokenBatch(
        positions=torch.arange(first, first + size),
        text=text,
        text_mask=text != 0,
        codes=torch.randint(0, CODES, (size, *GRID), generator=stream),
        extra={TEXT_EMBEDS: torch.randn(size, TEXT, WIDTH, generator=stream), TEXT_EMBEDS_MASK: text != 0},
    )


def logits(model: Parti, batch: TokenBatch, count: int = IMAGE - 1) -> torch.Tensor:
    context = model.encode_condition(batch.text, batch.text_mask, batch.extra)
    return model.logits(batch.codes.flatten(1)[:, :count], context)


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_loss_is_the_cross_entropy_of_every_code(options):
    model, batch = make(**options).eval(), make_batch()
    wanted = F.cross_entropy(logits(model, batch).flatten(0, 1), batch.codes.flatten())
    out = model(batch)
    torch.testing.assert_close(out.total, wanted, rtol=1e-6, atol=0)
    assert out.parts == {"image": out.total}
    ranked = logits(model, batch).argmax(-1) == batch.codes.flatten(1)
    assert out.metrics["image_accuracy"] == ranked.float().mean()


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("dim", [16, 256])
def test_the_loss_starts_at_the_logarithm_of_the_codebook(options, dim):
    model, batch = make(**options, dim=dim, num_image_tokens=500), make_batch()
    codes = torch.randint(0, 500, (3, *GRID), generator=rng.generator(0, "codes"))
    loss = model(TokenBatch(batch.positions, batch.text, batch.text_mask, codes, extra=batch.extra)).total
    assert abs(loss.item() - math.log(500)) < 0.5


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_position_sees_the_codes_before_it_and_no_other(options):
    model, batch = make(**options | {"kernel_size": 9}).eval(), make_batch()
    before = logits(model, batch)
    changed = batch.codes.flatten(1).clone()
    changed[:, 6] = (changed[:, 6] + 1) % CODES
    context = model.encode_condition(batch.text, batch.text_mask, batch.extra)
    after = model.logits(changed[:, : IMAGE - 1], context)
    differs = (before - after).abs().amax((0, 2)) > 1e-6
    assert differs.tolist() == [False] * 7 + [True] * 5


def test_convolutional_layers_see_their_window_only():
    model, batch = make(**PAPER | {"sandwich_norm": False}, depth=1).eval(), make_batch()
    context = model.encode_condition(batch.text, batch.text_mask, batch.extra)
    codes = batch.codes.flatten(1)[:, : IMAGE - 1]
    before, changed = model.logits(codes, context), codes.clone()
    changed[:, 0] = (changed[:, 0] + 1) % CODES
    differs = (before - model.logits(changed, context)).abs().amax((0, 2)) > 1e-6
    # Position i + 1 has read code i; a 3 x 3 window around it reaches the code at the corner from four places.
    assert differs.nonzero().flatten().tolist() == [1, 2, 5, 6]


def test_a_whole_image_has_logits_after_its_last_code_too():
    model, batch = make().eval(), make_batch()
    whole = logits(model, batch, IMAGE)
    assert whole.shape == (3, IMAGE + 1, CODES)
    torch.testing.assert_close(whole[:, :-1], logits(model, batch), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="one too few"):
        logits(make(rel_pos_index="sequence"), batch, IMAGE)


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_everything_is_made_where_the_batch_lies(options):
    with torch.device("meta"):
        model = make(**options)
    batch = make_batch().to(torch.device("meta"))
    assert model(batch).total.device.type == "meta"


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_bfloat16_runs_forward_and_backward(options):
    model, batch = make(**options).to(torch.bfloat16), make_batch()
    assert not list(model.buffers()), "a buffer is not cast by an engine that casts parameters"
    out = model(batch)
    out.total.backward()
    assert out.total.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    exact = make(**options)(batch).total
    torch.testing.assert_close(out.total, exact, rtol=2e-2, atol=0)


def test_dropout_reaches_every_branch():
    model, batch = make(dropout=0.5), make_batch()
    branches = [layer.self_attn for layer in model.decoder.layers] + [
        layer.cross_attn for layer in model.decoder.layers
    ]
    branches += [layer.ff for layer in model.decoder.layers]
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [branch.dropout.p for branch in branches] == [0.5] * 6 and len(drops) == 6
    for branch in branches:
        for drop in drops:
            drop.p = 0.5 if drop is branch.dropout else 0.0
        with rng.scope(0, "dropout"):
            first = model(batch).total
        with rng.scope(1, "dropout"):
            second = model(batch).total
        assert first != second
    model.eval()
    assert model(batch).total == model(batch).total


def test_keys_and_values_are_two_unless_tied():
    apart, tied = make(), make(kv_tied=True)
    for name in ("self_attn", "cross_attn"):
        two, one = (getattr(model.decoder.layers[0], name) for model in (apart, tied))
        assert two.to_kv.out_features == 2 * one.to_kv.out_features == 16
        assert two.null_kv.numel() == 2 * one.null_kv.numel()
        k, v = one.keys_and_values(torch.randn(1, 3, one.to_kv.in_features), null=True)
        assert k is v
    assert make(multi_query=False).decoder.layers[0].self_attn.to_kv.out_features == 2 * 16


def test_it_is_built_from_sizes_alone():
    model = make(condition=EmbeddingsConfig(width=7))
    assert isinstance(build_model(model.config), Parti)
    assert model.decoder.layers[0].cross_attn.to_kv.in_features == 7


class Tokenizer(nn.Module):
    """One code a pixel."""

    num_tokens, image_size, channels, code_shape, fingerprint = CODES, 4, 1, GRID, "pixels"

    def __init__(self) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.zeros(3))
        self.eval()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return pixels[:, 0].long() % CODES


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_tokenizer_is_no_part_of_the_model_and_every_weight_is_trained(options):
    model, tokenizer, batch = make(**options).train(), Tokenizer(), make_batch()
    pixels = torch.randint(0, 256, (3, 1, *GRID), generator=rng.generator(0, "pixels")).to(torch.uint8)
    tokens = token_batch(ImageBatch(batch.positions, pixels, text=batch.text, text_mask=batch.text_mask), tokenizer)
    model(TokenBatch(tokens.positions, tokens.text, tokens.text_mask, tokens.codes, extra=batch.extra)).total.backward()
    assert not any(isinstance(child, Tokenizer) for child in model.modules())
    names = [name for group in parameter_groups(model) for name in group.parameters]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert tokenizer.codebook.grad is None


def test_embeddings_positions_and_biases_do_not_decay():
    decaying = {group.name: set(group.parameters) for group in parameter_groups(make())}["decay"]
    assert "decoder.layers.0.self_attn.to_q.weight" in decaying
    assert not {name for name in decaying if "positions" in name or "bias" in name or "head" in name or "norm" in name}


def test_captions_are_hidden_by_position_alone_and_in_training_only():
    model, many = make(cond_drop_prob=0.25), torch.arange(4000)
    kept = model.kept_captions(many)
    assert 0.72 < kept.float().mean() < 0.78
    assert torch.equal(kept[100:200], model.kept_captions(many[100:200]))
    batch = make_batch()
    dropped = next(at for at in range(100) if not model.kept_captions(torch.arange(at, at + 1)))
    one = TokenBatch(
        torch.tensor([dropped]), batch.text[:1], batch.text_mask[:1], batch.codes[:1],
        extra={name: value[:1] for name, value in batch.extra.items()},
    )  # fmt: skip
    other = TokenBatch(
        one.positions, one.text, one.text_mask, one.codes, extra=one.extra | {TEXT_EMBEDS: one.extra[TEXT_EMBEDS] + 1}
    )
    assert model(one).total == model(other).total
    model.eval()
    assert model(one).total != model(other).total


def test_the_caption_counts_up_to_max_text_len():
    model, batch = make(max_text_len=3).eval(), make_batch()
    changed = batch.extra[TEXT_EMBEDS].clone()
    changed[:, 3:] += 1
    longer = TokenBatch(
        batch.positions, batch.text, batch.text_mask, batch.codes, extra=batch.extra | {TEXT_EMBEDS: changed}
    )
    assert torch.equal(logits(model, batch), logits(model, longer))
    changed[:, 1] += 1
    assert not torch.equal(logits(model, batch), logits(model, longer))


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_remat_gives_the_same_gradients(options):
    grads = []
    for remat in ("none", "block"):
        model = make(**options, remat=remat, dropout=0.1)
        with rng.scope(0, "dropout"):
            model(make_batch()).total.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{"ff_norm": False}, {"sandwich_norm": True}, {"ff_mult": 2}, {"multi_query": False}, {"kv_tied": True}]
)
def test_the_option_changes_the_weights(options):
    shapes = [{n: p.shape for n, p in make(**given).named_parameters()} for given in ({}, options)]
    assert shapes[0] != shapes[1]


def test_codes_of_another_grid_are_refused():
    batch = make_batch()
    wrong = TokenBatch(batch.positions, batch.text, batch.text_mask, batch.codes[:, :2], extra=batch.extra)
    with pytest.raises(DataError, match=r"image_grid=\(3, 4\)"):
        make()(wrong)


def test_flops_are_the_formula():
    model = make(condition=EmbeddingsConfig(width=16), depth=1)
    per_position = 16 * (16 + 16 + 16) + 2 * 16 * 16 + 2 * 16 * 64  # self-attention, cross-attention, feed-forward
    forward = IMAGE * per_position + TEXT * 16 * 16 + 2 * 16 * (IMAGE * (IMAGE + 3) // 2 + IMAGE * (TEXT + 1))
    assert model.train_flops() == 3 * 2 * (forward + IMAGE * 16 * CODES)
