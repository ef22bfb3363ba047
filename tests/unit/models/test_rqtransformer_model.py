"""RQ-Transformer's loss: what each prediction may see, what counts, and what training options do to a batch."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from tokscale.base import rng
from tokscale.base.batch import SOFT_TARGETS, TokenBatch
from tokscale.base.errors import ConfigError, DataError
from tokscale.models.registry import build_model
from tokscale.models.rqtransformer import (
    HierarchicalCausalTransformer,
    HierarchicalConfig,
    RQTransformer,
    RQTransformerConfig,
)

CODES, GRID, LEVELS, WORDS, TEXT = 13, (3, 4), 3, 11, 5
PLACES = math.prod(GRID)
CAPTION = {"kind": "caption", "depth": 1, "heads": 2, "dim_head": 8}
FANCY = {
    "ff_glu": True,
    "layer_scale": True,
    "rotary_emb": True,
    "shift_tokens": True,
    "attn_types": ("full", "axial_row"),
}
VARIANTS = {
    "original": {},
    "cumulative": {"cumulative_depth": True},
    "own_codes": {"shared_code_emb": False},
    "fancy": FANCY,
    "caption": {"condition": CAPTION, "cumulative_depth": True},
    "reversible": {"reversible": True, "shared_attn_ids": (0,)},
}


def make(**options: object) -> RQTransformer:
    sizes = {"num_tokens": CODES, "image_grid": GRID, "max_spatial_seq_len": PLACES, "depth_seq_len": LEVELS}
    words = {"num_text_tokens": WORDS, "text_seq_len": TEXT}
    small = {"dim": 16, "spatial_layers": 2, "depth_layers": 2, "heads": 2, "dim_head": 8}
    config = RQTransformerConfig(**small | sizes | words | options)  # type: ignore[arg-type]
    with rng.scope(0, "model"):
        return RQTransformer(config)


def make_hierarchy(**options: object) -> HierarchicalCausalTransformer:
    small = {"dim": 16, "heads": 2, "dim_head": 8, "num_tokens": CODES}
    lengths = {"depth": (2, 1, 1), "max_seq_len": (3, 4, 3)}
    with rng.scope(0, "model"):
        return HierarchicalCausalTransformer(HierarchicalConfig(**small | lengths | options))  # type: ignore[arg-type]


def make_batch(size: int = 3, first: int = 0, shape: tuple[int, ...] = (*GRID, LEVELS)) -> TokenBatch:
    stream = rng.generator(0, "batch")
    text = torch.randint(1, WORDS, (size, TEXT), generator=stream)
    text[0, 2:] = 0
    codes = torch.randint(0, CODES, (size, *shape), generator=stream)
    return TokenBatch(torch.arange(first, first + size), text, text != 0, codes)


def seen_by_each_code(model: HierarchicalCausalTransformer, batch: TokenBatch) -> torch.Tensor:
    """Which code's embedding has a gradient from which code's loss: `[predicted, seen]`, in raster order."""
    codes = batch.codes[:1]
    given: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        given.append(out.detach().requires_grad_())
        return given[-1]

    handle = model.code_emb.register_forward_hook(keep)
    hidden = model.hidden(model.structured(codes), model.context(batch.text[:1], batch.text_mask[:1]))
    handle.remove()
    losses = F.cross_entropy(model.head(hidden).flatten(0, -2), codes.flatten(), reduction="none")
    rows = []
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, given[0], retain_graph=True, allow_unused=True)
        rows.append((grad.abs().amax(-1) > 0).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_code_is_predicted_from_all_codes_before_it_and_nothing_else(variant):
    model = make(**VARIANTS[variant]).double()
    seen = seen_by_each_code(model, make_batch())
    total = PLACES * LEVELS
    wanted = torch.ones(total, total, dtype=torch.bool).tril(-1)
    if "attn_types" in VARIANTS[variant]:  # of kinds that see a part of the image: nothing that comes later
        assert not (seen & ~wanted).any() and seen[1:].any(1).all()
    else:
        assert torch.equal(seen, wanted)


def test_holds_for_any_number_of_stages():
    seen = seen_by_each_code(make_hierarchy().double(), make_batch())
    assert torch.equal(seen, torch.ones_like(seen).tril(-1))


def test_a_changed_code_moves_no_prediction_of_itself_or_before():
    model, batch = make().eval(), make_batch()
    before = model.logits(batch.codes)
    for at in range(PLACES * LEVELS):
        flat = batch.codes.flatten(1).clone()
        flat[:, at] = (flat[:, at] + 1) % CODES
        after = model.logits(flat)
        assert torch.equal(after[:, : at + 1], before[:, : at + 1])
        if at + 1 < PLACES * LEVELS:
            assert not torch.allclose(after[:, at + 1], before[:, at + 1], atol=1e-4)


def test_code_zero_counts_like_any_other():
    model, batch = make(), make_batch()
    zeros = TokenBatch(batch.positions, batch.text, batch.text_mask, torch.zeros_like(batch.codes))
    wanted = F.cross_entropy(model.logits(zeros.codes).flatten(0, 1), zeros.codes.flatten())
    torch.testing.assert_close(model(zeros).total, wanted, rtol=1e-6, atol=0)
    assert wanted > 1


def test_padding_is_no_code_and_is_not_counted():
    model, batch = make(), make_batch()
    codes = batch.codes.clone()
    codes[:, 2:] = -1
    out = model(TokenBatch(batch.positions, batch.text, batch.text_mask, codes))
    known = 2 * GRID[1] * LEVELS
    logits = model.logits(batch.codes)[:, :known]
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.codes.flatten(1)[:, :known].flatten())
    torch.testing.assert_close(out.total, wanted, rtol=1e-6, atol=0)
    nothing = TokenBatch(batch.positions, batch.text, batch.text_mask, torch.full_like(codes, -1))
    assert model(nothing).total == 0
    with pytest.raises(ValueError, match="pad_id=0 is one of the 13 codes"):
        make(pad_id=0)


def test_padding_is_embedded_as_nothing():
    model, batch = make(), make_batch()
    codes = model.structured(batch.codes).clone()
    codes[:, 0], codes[:, 2:] = 0, -1
    before = model.inputs(codes)[-1].detach().clone()
    with torch.no_grad():
        model.code_emb.weight[0] += 10.0
    after = model.inputs(codes)[-1]
    assert torch.equal(before[codes != 0], after[codes != 0]) and not torch.equal(before, after)


def test_the_first_code_is_a_label():
    model, batch = make(), make_batch()
    model(batch).total.backward()
    trained = model.opening.start.grad.clone()
    first = F.cross_entropy(model.logits(batch.codes)[:, 0], batch.codes.flatten(1)[:, 0])
    assert trained.any() and torch.autograd.grad(first, model.opening.start)[0].any()
    fixed = TokenBatch(batch.positions, batch.text, batch.text_mask, batch.codes.clone())
    fixed.codes.flatten(1)[:, 0] = 5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(fixed).total.backward()
        optimizer.step()
    assert (model.logits(torch.zeros(1, 0, dtype=torch.long))[:, 0].argmax(-1) == 5).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_that_of_the_logits(variant):
    model, batch = make(**VARIANTS[variant]), make_batch()
    context = model.context(batch.text, batch.text_mask)
    rows = F.cross_entropy(model.logits(batch.codes, context).flatten(0, 1), batch.codes.flatten(), reduction="none")
    out = model(batch)
    torch.testing.assert_close(out.total, rows.mean(), rtol=1e-6, atol=0)
    levels = rows.detach().unflatten(0, (-1, LEVELS)).mean(0)
    shown = torch.stack([out.metrics[f"loss_level_{level + 1}"] for level in range(LEVELS)])
    torch.testing.assert_close(shown, levels, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seen", [0, 1, 2, 3, 7, 12, 35, 36])
def test_logits_of_the_first_codes_are_those_of_all(seen):
    model, batch = make(cumulative_depth=True), make_batch()
    flat = batch.codes.flatten(1)
    part = model.logits(flat[:, :seen])
    assert part.shape == (3, min(seen + 1, 36), CODES)
    torch.testing.assert_close(part, model.logits(flat)[:, : part.shape[1]], rtol=1e-5, atol=1e-5)


def test_codes_may_come_flat_as_places_or_as_a_grid():
    model, batch = make(), make_batch()
    wanted = model.structured(batch.codes)
    assert wanted.shape == (3, PLACES, LEVELS)
    for shape in ((PLACES, LEVELS), (PLACES * LEVELS,)):
        assert torch.equal(model.structured(batch.codes.flatten(1).unflatten(1, shape)), wanted)
    assert model.structured(batch.codes.flatten(1)[:, :4])[:, 1].tolist()[0][1:] == [-1, -1]
    small = TokenBatch(batch.positions, batch.text, batch.text_mask, batch.codes.int())
    assert model(small).total == model(batch).total


def test_wrong_shapes_are_named():
    model = make()
    for shape in ((4, 3, LEVELS), (37,), (PLACES, LEVELS + 1), (PLACES + 1, LEVELS)):
        with pytest.raises(DataError, match=r"for a model of \(3, 4, 3\)"):
            model.structured(torch.zeros(2, *shape, dtype=torch.long))


def test_cumulative_depth_feeds_the_sum_of_the_codes_so_far():
    model, batch = make(cumulative_depth=True), make_batch()
    codes = model.structured(batch.codes)
    embedded, stages = model.code_emb(codes), model.stages
    spatial, depth = model.inputs(codes)
    torch.testing.assert_close(depth[..., 2, :], embedded.sum(-2) + stages[1].positions.weight[2])
    wanted = embedded.sum(-2) + stages[1].positions.weight.sum(0) + stages[0].positions.weight
    torch.testing.assert_close(spatial, wanted, rtol=1e-5, atol=1e-5)


def test_codes_of_one_number_at_different_levels_are_one_or_several():
    codes = torch.tensor([[[1, 2, 3], [3, 2, 1]]])
    for shared in (True, False):
        model = make(shared_code_emb=shared, rotary_emb=True)
        spatial = model.inputs(codes)[0]
        assert torch.allclose(spatial[0, 0], spatial[0, 1], atol=1e-6) == shared
        assert model.code_emb.num_embeddings == CODES * (1 if shared else LEVELS)


def test_a_hierarchy_of_two_stages_is_the_rq_transformer():
    rq, two = make(), make_hierarchy(depth=(2, 2), max_seq_len=(12, 3), returned_shape=(*GRID, LEVELS))
    two.load_state_dict(rq.state_dict())
    batch = make_batch()
    assert rq(batch).total == two(batch).total


@pytest.mark.parametrize("kind", ["caption", "embeddings", "classes"])
def test_a_condition_is_seen_by_every_code(kind):
    conditions = {
        "caption": CAPTION,
        "embeddings": {"kind": kind, "width": 6},
        "classes": {"kind": kind, "num_classes": 4},
    }
    model, batch = make(condition=conditions[kind]).eval(), make_batch()
    states, mask = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool)
    extra = {"text_embeds": states, "text_embeds_mask": mask, "labels": torch.tensor([0, 1, 2])}
    other = {"text_embeds": states + 1, "text_embeds_mask": mask, "labels": torch.tensor([3, 3, 3])}
    flipped = torch.where(batch.text > 0, WORDS - batch.text, 0)
    one = model.logits(batch.codes, model.context(batch.text, batch.text_mask, extra))
    two = model.logits(batch.codes, model.context(flipped, batch.text_mask, other))
    assert ((one - two).abs().amax(-1) > 1e-5).all()


def test_padding_of_captions_says_nothing():
    model, batch = make(condition=CAPTION).eval(), make_batch()
    text = torch.where(batch.text_mask, batch.text, 7)
    one, two = (model.logits(batch.codes, model.context(t, batch.text_mask)) for t in (batch.text, text))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_embeddings_of_any_length_fill_the_prefix():
    model, batch = make(condition={"kind": "embeddings", "width": 6}).eval(), make_batch()
    states, mask = torch.randn(3, 9, 6), torch.ones(3, 9, dtype=torch.bool)
    mask[:, 3:] = False
    short = {"text_embeds": states[:, :3], "text_embeds_mask": mask[:, :3]}
    long = {"text_embeds": states, "text_embeds_mask": mask}
    one, two = (model.logits(batch.codes, model.context(batch.text, batch.text_mask, extra)) for extra in (short, long))
    assert torch.equal(one, two)


def test_hidden_conditions_leave_the_batch_as_it_was():
    model, batch = make(condition=CAPTION, cond_drop_prob=1.0).train(), make_batch()
    before = batch.text.clone(), batch.text_mask.clone(), batch.codes.clone()
    dropped = model(batch).total
    assert all(map(torch.equal, before, (batch.text, batch.text_mask, batch.codes)))
    empty = TokenBatch(batch.positions, batch.text, torch.zeros_like(batch.text_mask), batch.codes)
    torch.testing.assert_close(dropped, model.eval()(empty).total, rtol=1e-6, atol=0)
    assert dropped != model(batch).total


def test_conditions_are_hidden_by_position_alone_and_in_training_only():
    model, whole = make(condition=CAPTION, cond_drop_prob=0.4), make_batch(8, first=100)
    halves = [model(part).total for part in whole.split(2)]
    torch.testing.assert_close(model(whole).total, sum(halves) / 2, rtol=1e-6, atol=0)
    assert 0.55 < model.kept_conditions(torch.arange(1000)).float().mean() < 0.65
    assert model.eval()(whole).total == make(condition=CAPTION).eval()(whole).total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", ["original", "caption"])
def test_other_precisions_train(variant, dtype):
    model, batch = make(**VARIANTS[variant]).to(dtype), make_batch()
    out = model(batch)
    out.total.backward()
    assert out.total.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.total.float(), make(**VARIANTS[variant])(batch).total, rtol=2e-2, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_gradient(variant):
    model = make(**VARIANTS[variant]).train()
    model(make_batch()).total.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_dropout_and_remat_do_what_they_say():
    batch = make_batch()
    plain, remat = make(), make(remat="block")
    for model in (plain, remat):
        model(batch).total.backward()
    for one, two in zip(plain.parameters(), remat.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7)
    for option in ("attn_dropout", "ff_dropout"):
        with rng.scope(0, "dropout"):
            assert make(**{option: 0.5}).train()(batch).total != plain(batch).total
        assert make(**{option: 0.5}).eval()(batch).total == plain.eval()(batch).total


@pytest.mark.parametrize("options", [{"sandwich_norm": True}, {"kernel_size": 3, "attn_types": ("conv_like",)}, FANCY])
def test_options_of_the_stack_change_what_is_computed(options):
    batch = make_batch()
    assert make(**options)(batch).total != make()(batch).total
    dense = make(**options, attn_backend="dense")(batch).total
    torch.testing.assert_close(make(**options)(batch).total, dense, rtol=1e-5, atol=0)


def test_flops_follow_the_parameters():
    model = make(condition=CAPTION)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    spatial = sum(size for name, size in sizes.items() if name.startswith("stages.0.stack"))
    depth = sum(size for name, size in sizes.items() if name.startswith("stages.1.stack"))
    encoder = sum(size for name, size in sizes.items() if "encoder.stack" in name)
    products = (PLACES + TEXT) * spatial + PLACES * LEVELS * (depth + sizes["head.weight"])
    products += TEXT * (encoder + sizes["opening.project.weight"])
    assert 6 * products < model.train_flops() < 1.2 * 6 * products


def test_registry_builds_the_models_of_their_configs():
    assert type(build_model(make().config)) is RQTransformer
    assert type(build_model(make_hierarchy().config)) is HierarchicalCausalTransformer
    with pytest.raises(ConfigError, match="max_spatial_seq_len"):
        build_model(RQTransformerConfig(dim=16, spatial_layers=1, depth_layers=1))


def test_distributions_of_codes_are_the_targets_where_the_batch_has_them():
    model, batch = make(), make_batch()
    one_hot = F.one_hot(batch.codes, CODES).float()
    same = model(dataclasses.replace(batch, extra={SOFT_TARGETS: one_hot})).total
    torch.testing.assert_close(same, model(batch).total)
    target_probs = torch.rand(*batch.codes.shape, CODES, generator=rng.generator(0, "chances")).softmax(-1)
    soft = model(dataclasses.replace(batch, extra={SOFT_TARGETS: target_probs}))
    logits = model.logits(batch.codes)[:, : PLACES * LEVELS]
    torch.testing.assert_close(soft.total, F.cross_entropy(logits.flatten(0, 1), target_probs.flatten(0, -2)))
