"""Drawing codes, against slow oracles that recompute everything at each step."""

import math
from collections.abc import Sequence

import pytest
import torch
from test_rqtransformer_model import CAPTION, CODES, FANCY, GRID, LEVELS, PLACES, make, make_batch, make_hierarchy

from tokscale.base.config import decode
from tokscale.base.errors import ConfigError
from tokscale.models.rqtransformer import HierarchicalCausalTransformer, RQSampling
from tokscale.nn.conditioning import Context
from tokscale.nn.sampling import SampleStreams, sample_ids

VARIANTS = {
    "original": {},
    "cumulative": {"cumulative_depth": True, "shared_code_emb": False},
    "fancy": FANCY,
    "reversible": {"reversible": True, "shift_tokens": True},
}


def sharp(model: HierarchicalCausalTransformer) -> HierarchicalCausalTransformer:
    """Distributions far from uniform, so that a wrong logit changes what is drawn."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale" in name:
                parameter.fill_(0.7)
            elif name.startswith("head"):
                parameter.mul_(4)
    return model.eval()


@torch.no_grad()
def slow_codes(
    model: HierarchicalCausalTransformer,
    context: Context | None,
    prime: torch.Tensor,
    options: RQSampling,
    seeds: Sequence[int],
) -> torch.Tensor:
    """The original's loop: a full pass, or two, for every code."""
    codes = prime
    for at in range(prime.shape[1], math.prod(model.lengths)):
        logits = model.logits(codes, context)[:, -1].float()
        if (scale := options.scale_at(at, math.prod(model.lengths))) != 1 and context is not None:
            null = model.logits(codes, context.only(torch.zeros(len(codes), dtype=torch.bool)))[:, -1].float()
            logits = null + (logits - null) * scale
        temperature, filter_thres, top_p = options.at(at % model.lengths[-1])
        drawn = sample_ids(
            logits,
            SampleStreams(seeds, [f"code/{at}"]),
            f"code/{at}",
            temperature=temperature,
            filter_thres=filter_thres,
            top_p_mass=top_p,
        )
        codes = torch.cat([codes, drawn[:, None]], dim=1)
    return codes.unflatten(1, model.config.code_shape)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_guided_decoding_equals_full_passes(variant, scale):
    model, batch, seeds = sharp(make(condition=CAPTION, **VARIANTS[variant])), make_batch(), [5, 6, 7]
    how = RQSampling(cond_scale=scale, filter_thres=0.3)
    codes = model.generate_codes(batch.text, batch.text_mask, options=how, seeds=seeds)
    context = model.context(batch.text, batch.text_mask)
    assert torch.equal(codes, slow_codes(model, context, torch.zeros(3, 0, dtype=torch.long), how, seeds))


def test_guidance_follows_its_schedule():
    model, batch, seeds = sharp(make(condition=CAPTION)), make_batch(), [5, 6, 7]
    how = RQSampling(cond_scale=6.0, cond_scale_schedule="linear", cond_scale_interval=(0.2, 0.9), filter_thres=0.3)
    codes = model.generate_codes(batch.text, batch.text_mask, options=how, seeds=seeds)
    context, none = model.context(batch.text, batch.text_mask), torch.zeros(3, 0, dtype=torch.long)
    assert torch.equal(codes, slow_codes(model, context, none, how, seeds))
    assert not torch.equal(codes, slow_codes(model, context, none, RQSampling(cond_scale=6.0, filter_thres=0.3), seeds))


def test_any_number_of_stages_draws_alike():
    model, seeds = sharp(make_hierarchy()), [1, 2]
    wanted = slow_codes(model, None, torch.zeros(2, 0, dtype=torch.long), RQSampling(filter_thres=0.3), seeds)
    assert torch.equal(model.generate(batch=2, options=RQSampling(filter_thres=0.3), seeds=seeds), wanted)
    prime = wanted.flatten(1)[:, :17]
    assert torch.equal(model.generate(prime, options=RQSampling(filter_thres=0.3), seeds=seeds), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_equal_full_passes(variant, monkeypatch):
    model = sharp(make(**VARIANTS[variant]))
    given: list[torch.Tensor] = []
    head = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda *args: given.append(head(*args)) or given[-1])
    codes = model.generate(batch=3, options=RQSampling(filter_thres=0.3))
    monkeypatch.undo()
    torch.testing.assert_close(torch.stack(given, dim=1), model.logits(codes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [0, 1, 3, 4, 17, 35])
@pytest.mark.parametrize("variant", ["cumulative", "fancy"])
def test_priming_goes_on_from_any_code(variant, known):
    model, batch, seeds = sharp(make(**VARIANTS[variant])), make_batch(), [1, 2, 3]
    prime, how = batch.codes.flatten(1)[:, :known], RQSampling(filter_thres=0.3)
    codes = model.generate(prime, options=how, seeds=seeds)
    assert torch.equal(codes.flatten(1)[:, :known], prime)
    assert torch.equal(codes, slow_codes(model, None, prime, how, seeds))


def test_priming_takes_places_too_and_must_leave_something():
    model, batch = sharp(make()), make_batch()
    places = batch.codes.flatten(1, 2)[:, :5]
    drawn = model.generate(places, seeds=[1, 2, 3])
    assert drawn.shape == (3, *GRID, LEVELS) and torch.equal(drawn.flatten(1, 2)[:, :5], places)
    with pytest.raises(ConfigError, match="give fewer than all"):
        model.generate(batch.codes)


def test_every_position_is_computed_once(monkeypatch):
    model, lengths = sharp(make()), []
    for stage in model.stages:
        run = stage.stack.forward
        monkeypatch.setattr(
            stage.stack, "forward", lambda x, run=run, **rest: lengths.append(x.shape[1]) or run(x, **rest)
        )
    model.generate(batch=2)
    assert lengths == [1] * (PLACES + PLACES * LEVELS)


def test_guidance_changes_what_is_drawn_and_needs_a_condition():
    batch, seeds = make_batch(), [5, 6, 7]
    for options, same in (({"condition": CAPTION}, False), ({}, True)):
        model = sharp(make(**options))
        drawn = [
            model.generate_codes(
                batch.text, batch.text_mask, options=RQSampling(cond_scale=scale, filter_thres=0.3), seeds=seeds
            )
            for scale in (1.0, 8.0)
        ]
        assert torch.equal(*drawn) == same


def test_options_apply_level_by_level():
    model = sharp(make())
    greedy = RQSampling(temperature=0)
    mixed = RQSampling(temperature=(0, 1, 1), filter_thres=(0.0, 0.99, 0.0), top_p=(1, 1, 1e-6))  # each takes the best
    drawn = [model.generate(batch=4, options=options) for options in (greedy, mixed)]
    assert torch.equal(*drawn)
    with pytest.raises(ConfigError, match=r"sampling.top_p: got \[0.5, 0.9\] for 3 levels"):
        model.generate(options=RQSampling(top_p=(0.5, 0.9)))
    assert decode(RQSampling, {"temperature": 0.5, "top_p": [1, 1, 0.9]}).at(2) == (0.5, 0.9, 0.9)


def test_temperature_zero_takes_the_most_likely():
    model = sharp(make())
    codes = model.generate(batch=3, options=RQSampling(temperature=0))
    assert torch.equal(model.logits(codes).argmax(-1), codes.flatten(1))


def test_noise_is_fine_enough_in_bfloat16():
    model = make().to(torch.bfloat16)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    codes = model.generate(batch=40, options=RQSampling(filter_thres=0.0))
    assert codes.float().mean() == pytest.approx((CODES - 1) / 2, abs=0.4)


def test_drawing_keeps_no_graph_no_dropout_and_no_mode():
    model = sharp(make(ff_dropout=0.5, attn_dropout=0.5)).train()
    model.stages[1].eval()
    how = RQSampling(filter_thres=0.3)
    codes = model.generate(batch=2, options=how)
    assert model.training and model.stages[0].training and not model.stages[1].training
    assert torch.equal(codes, sharp(make()).generate(batch=2, options=how))
    assert not codes.requires_grad and all(parameter.grad is None for parameter in model.parameters())


def test_a_caption_with_its_seed_is_the_same_image_in_any_batch():
    model, batch = sharp(make(condition=CAPTION)), make_batch()
    how = RQSampling(cond_scale=2.0, filter_thres=0.3)
    together = model.generate_codes(batch.text, batch.text_mask, options=how, seeds=[5, 6, 7])
    alone = model.generate_codes(batch.text[1:2], batch.text_mask[1:2], options=how, seeds=[6])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(alone, model.generate_codes(batch.text[1:2], batch.text_mask[1:2], options=how, seeds=[8]))
    with pytest.raises(ConfigError, match="2 seeds for 3 captions"):
        model.generate_codes(batch.text, batch.text_mask, options=how, seeds=[1, 2])
