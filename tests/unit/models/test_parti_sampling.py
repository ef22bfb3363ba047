"""Drawing images from Parti, against a slow oracle that recomputes everything at each step."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_parti_model import ARCHITECTURES, CAPTION, CODES, GRID, IMAGE, PAPER, TEXT, make, make_batch

from tokscale.base.batch import TokenBatch
from tokscale.base.errors import ConfigError, DataError
from tokscale.models.parti import Parti, PartiSampling
from tokscale.nn.sampling import gumbel_sample, sample_noise, top_k

SEEDS = [5, 6, 7]
VARIANTS = ARCHITECTURES | {
    "tied": {"kv_tied": True, "rel_pos_index": "sequence"},
    "many heads": {"multi_query": False},
    "mixed kinds": PAPER
    | {"multi_query": True, "attn_types": ("full", "axial_row", "axial_col", "conv_like"), "depth": 4},
    "own encoder": {"condition": CAPTION},
}


def sharp(**options: object) -> Parti:
    """A model whose distributions are far from uniform, so that a wrong logit changes what is drawn."""
    model = make(**options).eval()
    with torch.no_grad():
        model.head.weight.mul_(3)
        for name, parameter in model.named_parameters():
            if "cross_attn.to_out" in name or "table" in name:
                parameter.mul_(10)
    return model


def generate(model: Parti, batch: TokenBatch, seeds: Sequence[int] = tuple(SEEDS), **options: Any) -> torch.Tensor:
    how = PartiSampling(**options)
    return model.generate_codes(batch.text, batch.text_mask, options=how, seeds=seeds, extra=batch.extra)


@torch.no_grad()
def slow_codes(model: Parti, batch: TokenBatch, options: PartiSampling, seeds: Sequence[int]) -> torch.Tensor:
    """The original's loop without a cache: a full pass, or two, for every code."""
    context = model.encode_condition(batch.text, batch.text_mask, batch.extra)
    codes = batch.codes.flatten(1)[:, :0]
    for at in range(IMAGE):
        logits = model.logits_with_cond_scale(codes, context, options.scale_at(at, IMAGE))[:, -1].float()
        noise = sample_noise(seeds, f"code/{at}", CODES)
        drawn = gumbel_sample(top_k(logits, options.filter_thres), options.temperature, noise)
        codes = torch.cat([codes, drawn[:, None]], dim=1)
    return codes.unflatten(1, GRID)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_cached_guided_decoding_equals_full_passes(options, scale):
    model, batch = sharp(**options), make_batch()
    how = PartiSampling(cond_scale=scale, filter_thres=0.2)
    codes = generate(model, batch, cond_scale=scale, filter_thres=0.2)
    assert torch.equal(codes, slow_codes(model, batch, how, SEEDS))
    assert len(set(codes.flatten().tolist())) > 3


def test_guidance_follows_its_schedule():
    model, batch = sharp(), make_batch()
    how = {"cond_scale_schedule": "power", "cond_scale_start": 0.0, "cond_scale_interval": (0.2, 0.9)}
    codes = generate(model, batch, cond_scale=6.0, filter_thres=0.2, **how)
    assert torch.equal(codes, slow_codes(model, batch, PartiSampling(cond_scale=6.0, filter_thres=0.2, **how), SEEDS))
    assert not torch.equal(codes, generate(model, batch, cond_scale=6.0, filter_thres=0.2))


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_cached_logits_equal_the_full_forward(options):
    model, batch = sharp(**options), make_batch()
    context, codes = model.encode_condition(batch.text, batch.text_mask, batch.extra), batch.codes.flatten(1)
    memory, steps = model.decoder.remember(context, torch.float32), []
    x = model.embed(codes[:, :0])
    for at in range(IMAGE):
        steps.append(model.head(model.decoder.step(x, at, memory)))
        x = model.embed(codes[:, at : at + 1], start=at)
    torch.testing.assert_close(torch.cat(steps, dim=1), model.logits(codes[:, :-1], context), rtol=1e-5, atol=1e-5)


def test_the_scale_that_is_asked_for_is_used_and_one_costs_one_pass(monkeypatch):
    model, batch = sharp(), make_batch()
    rows: list[int] = []
    step = model.decoder.step
    monkeypatch.setattr(model.decoder, "step", lambda x, at, memory: rows.append(len(x)) or step(x, at, memory))
    drawn = [generate(model, batch, cond_scale=scale) for scale in (1.0, 3.0, 8.0)]
    assert rows == [3] * IMAGE + [6] * 2 * IMAGE
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_the_captions_keys_are_computed_once_and_shapes_never_change(monkeypatch):
    model, batch = sharp(), make_batch()
    asked: list[int] = []
    cross = model.decoder.layers[0].cross_attn
    memory_of = cross.memory
    monkeypatch.setattr(cross, "memory", lambda states: asked.append(1) or memory_of(states))
    generate(model, batch)
    assert asked == [1]
    context = model.encode_condition(batch.text, batch.text_mask, batch.extra)
    kept = model.decoder.remember(context, torch.float32)[0].codes
    assert kept.keys.shape == (3, 1, IMAGE + 1, 8)


def test_a_caption_with_its_seed_is_the_same_image_in_any_batch():
    model, batch = sharp(), make_batch(6)
    seeds = [3, 1, 4, 1, 5, 9]
    together = generate(model, batch, seeds, cond_scale=2.0, filter_thres=0)
    for at in range(6):
        one = TokenBatch(
            batch.positions[at, None], batch.text[at, None], batch.text_mask[at, None], batch.codes[at, None],
            extra={name: value[at, None] for name, value in batch.extra.items()},
        )  # fmt: skip
        assert torch.equal(generate(model, one, seeds[at : at + 1], cond_scale=2.0, filter_thres=0)[0], together[at])
    assert not torch.equal(
        together, generate(model, batch, [seed + 10 for seed in seeds], cond_scale=2.0, filter_thres=0)
    )


def test_padding_never_reaches_an_image():
    model, batch = sharp(), make_batch()
    changed = torch.where(batch.text_mask[..., None], batch.extra["text_embeds"], 7.0)
    other = TokenBatch(
        batch.positions, batch.text, batch.text_mask, batch.codes, extra=batch.extra | {"text_embeds": changed}
    )
    assert torch.equal(generate(model, batch), generate(model, other))


def test_temperature_zero_takes_the_most_likely_as_the_smallest_top_k_and_nucleus_do():
    model, batch = sharp(), make_batch()
    greedy = generate(model, batch, temperature=0, filter_thres=0)
    assert torch.equal(greedy, generate(model, batch, filter_thres=0.999))
    assert torch.equal(greedy, generate(model, batch, filter_thres=0, top_p=1e-6))
    assert not torch.equal(greedy, generate(model, batch, filter_thres=0))


def test_noise_is_fine_enough_in_bfloat16():
    model = make(num_image_tokens=4096, condition=CAPTION).to(torch.bfloat16).eval()
    with torch.no_grad():
        model.head.weight.zero_()
    text = torch.ones(64, TEXT, dtype=torch.long)
    how = PartiSampling(filter_thres=0)
    codes = model.generate_codes(text, text == 1, options=how, seeds=range(64))
    # Uniform over 4096 codes: a mean of 2048 with a standard error of 43.
    assert 1850 < codes.float().mean() < 2250


def test_wrong_calls_are_answered():
    model, batch = sharp(), make_batch()
    with pytest.raises(ConfigError, match="2 seeds for 3 captions"):
        generate(model, batch, [1, 2])
    with pytest.raises(DataError, match="text_embeds"):
        model.generate_codes(batch.text, batch.text_mask, options=PartiSampling(), seeds=SEEDS)
    assert not model.training
