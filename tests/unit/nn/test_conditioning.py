"""What a model is told: ids, embeddings or a class, as one context."""

import pytest
import torch

from tokscale.base.errors import ConfigError, DataError
from tokscale.nn.conditioning import CaptionConfig, ClassesConfig, Conditioning, Context, EmbeddingsConfig

TEXT = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]])
MASK = TEXT > 0


def told(config, extra=None, text=TEXT):
    made = Conditioning(config, dim=16, num_text_tokens=10, text_seq_len=4)
    return made, made(text, text > 0, extra or {})


def test_an_own_encoder_reads_the_caption_and_never_its_padding():
    encoder, context = told(CaptionConfig(depth=1, heads=2, dim_head=8))
    assert context.states.shape == (2, 4, 16) and torch.equal(context.mask, MASK)
    longer = encoder(torch.tensor([[3, 4, 9, 9]]), MASK[:1], {})
    assert torch.allclose(context.states[0, :2], longer.states[0, :2], atol=1e-6)
    other = encoder(torch.tensor([[4, 3, 0, 0]]), MASK[:1], {})
    assert not torch.allclose(context.states[0, 0], other.states[0, 1], atol=1e-3), "order counts"


def test_an_own_encoder_can_be_plain_and_drop():
    plain, _ = told(CaptionConfig(depth=1, heads=2, dim_head=8, ff_glu=False, layer_scale=False, dropout=0.5))
    gated, _ = told(CaptionConfig(depth=1, heads=2, dim_head=8))
    hidden = [made.encoder.stack.feedforwards[0].to_hidden.out_features for made in (plain, gated)]
    assert hidden == [64, 128]
    assert not any("scale" in name for name, _ in plain.named_parameters())
    assert not torch.equal(plain(TEXT, MASK, {}).states, plain(TEXT, MASK, {}).states)
    assert torch.equal(gated(TEXT, MASK, {}).states, gated(TEXT, MASK, {}).states)


def test_embeddings_pass_through_as_they_are():
    extra = {"text_embeds": torch.randn(2, 3, 12).bfloat16(), "text_embeds_mask": torch.ones(2, 3, dtype=torch.bool)}
    _, context = told(EmbeddingsConfig(width=12), extra)
    assert context.states is extra["text_embeds"] and context.mask is extra["text_embeds_mask"]


def test_a_class_is_one_state():
    made, context = told(ClassesConfig(num_classes=5), {"labels": torch.tensor([4, 0])})
    assert context.states.shape == (2, 1, 16) and context.mask.all()
    assert torch.equal(context.states[0, 0], made.classes.weight[4])


def test_what_is_dropped_is_hidden_and_nothing_else():
    kept = Context(torch.zeros(2, 4, 8), MASK).only(torch.tensor([False, True]))
    assert not kept.mask[0].any() and torch.equal(kept.mask[1], MASK[1])


def test_what_is_missing_is_named():
    with pytest.raises(DataError, match=r"text_embeds.*text_encoder"):
        told(EmbeddingsConfig(width=12))
    with pytest.raises(DataError, match=r"width 7 .*condition\.width=12"):
        told(EmbeddingsConfig(width=12), {"text_embeds": torch.zeros(2, 3, 7), "text_embeds_mask": MASK})
    with pytest.raises(DataError, match="labels"):
        told(ClassesConfig(num_classes=5))
    with pytest.raises(ConfigError, match=r"condition\.width"):
        Conditioning(EmbeddingsConfig(), dim=8)
    with pytest.raises(ConfigError, match="num_text_tokens"):
        Conditioning(CaptionConfig(), dim=8)
