"""MaskGIT's loss: against dense logits, and what training options do to a batch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from maskgit_models import CODES, COUNT, GRID, LOWRES, SEPARATE, TEXT, WORDS, inputs, logits, make, make_batch
from torch import nn

from tokscale.base.batch import LABELS, LOWRES_CODES, TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.config import decode
from tokscale.base.errors import ConfigError, DataError
from tokscale.models.maskgit import MaskGit, MaskGitConfig, layers
from tokscale.models.maskgit import model as maskgit_model
from tokscale.models.maskgit.masking import masks, sample_training_draws
from tokscale.models.maskgit.schedule import expected_masked
from tokscale.models.registry import ModelConfig, build_model

VARIANTS = [
    {"self_cond": True},
    {"no_mask_token_prob": 0.5},
    SEPARATE,
    {"self_token_critic": True, "self_cond": True},
    LOWRES | SEPARATE,
    {"lowres": {"image_grid": (2, 2), "layout": "encoder"}, "self_token_critic": True, "remat": "block"},
]


def dense_loss(model: MaskGit, batch: TokenBatch) -> torch.Tensor:
    """The original's loss: logits of all codes, and labels that are ignored where nothing is to be predicted."""
    codes, draws = batch.codes.flatten(1), sample_training_draws(model.config, batch.positions, COUNT, training=False)
    predicted, hidden = masks(model.config, draws, COUNT)
    dense = logits(model, batch, torch.where(hidden, CODES, codes))
    labels = torch.where(predicted, codes, -1)
    smoothing = model.config.label_smoothing
    return F.cross_entropy(dense.flatten(0, 1), labels.flatten(), ignore_index=-1, label_smoothing=smoothing)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"no_mask_token_prob": 0.4}, LOWRES])
def test_logits_of_masked_codes_alone_give_the_dense_loss_and_its_gradients(options):
    model, batch = make(loss_mean="tokens", **options).eval(), make_batch()
    wanted = dense_loss(model, batch)
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    total = model(batch).total
    total.backward()
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=0)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "loss_mean": "tokens"}, *VARIANTS])
def test_passes_of_fixed_shapes_give_the_same_losses_metrics_and_gradients(options, monkeypatch):
    """As a GPU computes them, which would have to be waited for where the number of rows follows from the batch."""
    model, batch, found = make(**options).train(), make_batch(8, first=50), []
    for selects in (True, False):
        for module in (layers, maskgit_model):
            monkeypatch.setattr(module, "may_select", lambda x, selects=selects: selects)
        model.zero_grad(set_to_none=True)
        output = model(batch)
        output.total.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append({"total": output.total.detach(), **output.parts, **output.metrics, **grads})
    assert (sample_training_draws(model.config, batch.positions, COUNT, training=True).keep_condition).any()
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{}, *VARIANTS])
def test_the_loss_does_not_depend_on_how_a_batch_is_split(options):
    model, whole = make(**options), make_batch(8, first=50)
    parts = [model(part).total for part in whole.split(4)]
    torch.testing.assert_close(model(whole).total, torch.stack(parts).mean(), rtol=1e-5, atol=0)


def test_the_expected_number_of_masked_codes_is_a_constant_that_the_mean_is_near():
    model = make()
    draws = [
        sample_training_draws(model.config, torch.arange(i, i + 64), COUNT, training=True) for i in range(0, 640, 64)
    ]
    numbers = [masks(model.config, each, COUNT)[0].sum() for each in draws]
    mean = torch.stack(numbers).double().mean() / 64
    assert mean.item() == pytest.approx(expected_masked(COUNT, "cosine", 2.0, 0.0), rel=0.01)


@pytest.mark.parametrize("options", [{}, *VARIANTS])
def test_every_parameter_gets_a_gradient(options):
    model = make(**options)
    model(make_batch()).total.backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not dead
    assert not any("self_cond" in name for name, _ in make().named_parameters())


@pytest.mark.parametrize("options", [SEPARATE, {"self_token_critic": True}])
def test_critics_are_trained_jointly_or_afterwards(options):
    joint, batch = make(**options, critic_loss_weight=0.5), make_batch()
    out = joint(batch)
    torch.testing.assert_close(out.total, out.parts["generator"] + 0.5 * out.parts["critic"])
    first = make(**options, train_only_generator=True)
    first(batch).total.backward()
    afterwards = make(**options, train_only_critic=True, critic_loss_weight=0.5)
    late = afterwards(batch)
    late.total.backward()
    assert first(batch).total == out.parts["generator"] and "critic" not in first(batch).parts
    torch.testing.assert_close(late.total, 0.5 * out.parts["critic"])
    for model, trained in ((first, False), (afterwards, True)):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None) == (("critic" in name) == trained), name
    assert afterwards.state_dict().keys() == first.state_dict().keys()


def test_the_critic_learns_where_drawn_codes_are_wrong():
    model, batch = make(**SEPARATE, sample_temperature=0.0).eval(), make_batch()
    codes, draws = batch.codes.flatten(1), sample_training_draws(model.config, batch.positions, COUNT, training=False)
    _, hidden = masks(model.config, draws, COUNT)
    drawn = logits(model, batch, torch.where(hidden, CODES, codes)).argmax(-1)
    filled = torch.where(hidden, drawn, codes)
    critic = model.token_critic
    scores = critic.to_logits(critic(filled, critic.context(inputs(model, batch))))[..., 0]
    wanted = F.binary_cross_entropy_with_logits(scores, (filled != codes).float())
    torch.testing.assert_close(model(batch).parts["critic"], wanted)


def test_drawings_for_the_critic_follow_the_temperature():
    batch = make_batch(64)
    metrics = [make(self_token_critic=True, sample_temperature=t)(batch).parts["critic"] for t in (0.0, 1.0)]
    assert metrics[0] != metrics[1]
    assert make(self_token_critic=True)(batch).parts["critic"] not in metrics


def test_cond_drop_hides_the_text_with_the_stated_probability():
    model = make(cond_drop_prob=0.1)
    draws = sample_training_draws(model.config, torch.arange(4000), 2, training=True)
    for kept in (draws.keep_condition, draws.critic_keep_condition):
        assert 0.08 < 1 - kept.float().mean() < 0.12  # hides a tenth: the peers' inversion would keep a tenth
    assert 0.005 < (~draws.keep_condition & ~draws.critic_keep_condition).float().mean() < 0.016, "drawn apart"
    assert sample_training_draws(model.config, torch.arange(4000), 2, training=False).keep_condition.all()
    batch = make_batch()
    other = replace(batch, text=batch.text.flip(0), text_mask=batch.text_mask.flip(0))
    assert make(cond_drop_prob=1.0)(batch).total == make(cond_drop_prob=1.0)(other).total
    assert make(cond_drop_prob=0.0)(batch).total != make(cond_drop_prob=0.0)(other).total


def test_the_batch_is_left_as_it_was():
    batch = make_batch()
    before = [batch.text.clone(), batch.text_mask.clone(), batch.codes.clone(), batch.extra[LOWRES_CODES].clone()]
    make(cond_drop_prob=1.0, self_cond=True, **LOWRES, **SEPARATE)(batch).total.backward()
    after = [batch.text, batch.text_mask, batch.codes, batch.extra[LOWRES_CODES]]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_first_look_happens_whatever_is_drawn_and_is_blended_by_sample():
    model, batch = make(self_cond=True, cond_drop_prob=0.0), make_batch(8)
    looks: list[int] = []
    model.transformer.register_forward_hook(lambda *_: looks.append(1))
    draws = sample_training_draws(model.config, batch.positions, COUNT, training=True)
    losses = {}
    for name, use_self_cond in {"none": torch.zeros(8), "all": torch.ones(8), "some": torch.arange(8) < 4}.items():
        losses[name] = model.loss(batch, replace(draws, use_self_cond=use_self_cond.bool())).total
        assert len(looks) == 2 and not looks.clear()
    assert len({loss.item() for loss in losses.values()}) == 3
    plain = make(self_cond=True, self_cond_prob=0.0, cond_drop_prob=0.0)
    torch.testing.assert_close(plain(batch).total, losses["none"])


def test_self_cond_prob_is_the_share_of_first_looks_that_are_fed_back():
    draws = sample_training_draws(make(self_cond_prob=0.8).config, torch.arange(2000), 2, training=True)
    assert 0.77 < draws.use_self_cond.float().mean() < 0.83


def test_low_resolution_codes_have_positions():
    for layout in ("cross", "encoder"):
        model, batch = make(lowres={"image_grid": (2, 2), "layout": layout}).eval(), make_batch()
        shuffled = replace(batch, extra={LOWRES_CODES: batch.extra[LOWRES_CODES].flip(2)})
        ids = torch.full((4, COUNT), CODES)
        assert (logits(model, batch, ids) - logits(model, shuffled, ids)).abs().max() > 1e-3


def test_super_resolution_trains_on_codes_alone_and_reads_them():
    model, batch = make(**LOWRES), make_batch()
    other = replace(batch, extra={LOWRES_CODES: (batch.extra[LOWRES_CODES] + 1) % CODES})
    assert model(batch).total != model(other).total
    with pytest.raises(DataError, match=r"no 'codes\.low'.*streams\.low"):
        model(replace(batch, extra={}))
    with pytest.raises(DataError, match=r"6 low-resolution codes .* lowres\.image_grid=\(2, 2\)"):
        model(replace(batch, extra={LOWRES_CODES: torch.zeros(4, 2, 3, dtype=torch.long)}))


def test_low_resolution_codes_may_be_of_another_codebook_or_share_the_table():
    apart, shared = (
        make(lowres={"image_grid": (2, 2), "num_tokens": 5}),
        make(lowres={"image_grid": (2, 2), "shared_emb": True}),
    )
    assert apart.transformer.lowres.embedding.num_embeddings == 5 and shared.transformer.lowres.embedding is None
    with pytest.raises(ConfigError, match="leave num_tokens out"):
        decode(
            MaskGitConfig, {"dim": 8, "depth": 1, "lowres": {"image_grid": (2, 2), "shared_emb": True, "num_tokens": 5}}
        )


def test_low_resolution_codes_are_never_dropped():
    model, batch = make(cond_drop_prob=1.0, **LOWRES), make_batch()
    other = replace(batch, extra={LOWRES_CODES: (batch.extra[LOWRES_CODES] + 1) % CODES})
    assert model(batch).total != model(other).total


def test_embeddings_are_projected_where_widths_differ():
    for width, projected in ((12, True), (16, False)):
        model = make(condition={"kind": "embeddings", "width": width})
        assert isinstance(model.transformer.text_embed_proj, nn.Linear) == projected
        states, mask = torch.randn(4, 3, width).bfloat16(), torch.ones(4, 3, dtype=torch.bool)
        batch = replace(make_batch(), extra={TEXT_EMBEDS: states, TEXT_EMBEDS_MASK: mask})
        model(batch).total.backward()
        with pytest.raises(DataError, match="text_embeds"):
            model(make_batch())


def test_classes_are_told():
    model = make(condition={"kind": "classes", "num_classes": 3}, cond_drop_prob=0.0)
    losses = [model(replace(make_batch(), extra={LABELS: torch.full((4,), label)})).total for label in range(3)]
    assert len({loss.item() for loss in losses}) == 3


def test_no_image_tokenizer_is_part_of_the_model():
    model = make(**SEPARATE)
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"reader", "transformer", "token_critic"}
    assert not any("vae" in name for name, _ in model.named_modules())


def test_the_self_critic_is_one_layer_and_its_generator_exists_once():
    plain, critic = make().state_dict(), make(self_token_critic=True).state_dict()
    assert critic.keys() - plain.keys() == {"token_critic.to_pred.weight", "token_critic.to_pred.bias"}


def test_low_precision_has_no_say_in_what_is_an_image():
    model, batch = make(), make_batch()
    assert model(replace(batch, codes=batch.codes.int())).total == model(batch).total
    for kind in (torch.float32, torch.bfloat16, torch.float16):  # images of any float type are refused alike
        with pytest.raises(Exception, match="codes"):
            model(replace(batch, codes=torch.zeros(4, *GRID, dtype=kind)))


def test_wrong_grids_and_levels_are_named():
    with pytest.raises(DataError, match=r"codes of shape \(3, 3\) for a model with image_grid=\(3, 4\)"):
        make()(replace(make_batch(), codes=torch.zeros(4, 3, 3, dtype=torch.long)))


def test_options_that_exclude_each_other_are_named():
    small = {"kind": "maskgit", "dim": 8, "depth": 1}
    for options, message in [
        ({"self_token_critic": True, **SEPARATE}, "exclude each other"),
        ({"train_only_critic": True}, "need a critic"),
        ({"self_token_critic": True, "train_only_critic": True, "train_only_generator": True}, "nothing to train"),
    ]:
        with pytest.raises(ConfigError, match=message):
            decode(ModelConfig, small | options)


def test_registry_builds_the_model_of_a_config():
    assert type(build_model(make().config)) is MaskGit
    with pytest.raises(ConfigError, match="num_text_tokens"):
        build_model(MaskGitConfig(dim=16, depth=1, num_tokens=5, image_grid=(2, 2)))
    with pytest.raises(ConfigError, match="image_grid"):
        build_model(MaskGitConfig(dim=16, depth=1))


def test_flops_follow_the_parameters():
    model = make(depth=4, cond_drop_prob=0)
    layers = model.transformer.transformer_blocks.layers
    context = sum(p.numel() for layer in layers for name, p in layer.cross_attn.named_parameters() if "to_kv" in name)
    matrices = sum(p.numel() for p in layers.parameters() if p.ndim == 2) - context
    products = 6 * (COUNT * matrices + TEXT * context) + 3 * model.reader.conditioning.forward_flops()
    assert products < model.train_flops() < 1.4 * products
    assert make(depth=4, self_cond=True, **SEPARATE).train_flops() > 1.3 * model.train_flops()


def test_text_has_the_width_of_the_configuration():
    assert make().text_seq_len == TEXT and make().reader.conditioning.encoder.embedding.num_embeddings == WORDS
