"""Drawing codes from MaskGIT, against a slow loop in the words of the original: full passes, all places, every id."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from maskgit_models import CODES, COUNT, GRID, LOWRES, SEPARATE, WORDS, inputs, logits, make, make_batch, sharp

from tokscale.base import rng
from tokscale.base.batch import LOWRES_CODES, TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.errors import ConfigError
from tokscale.models.maskgit import MaskGit, MaskGitSampling
from tokscale.models.maskgit.config import Schedule
from tokscale.models.maskgit.sample import SeededNoise
from tokscale.models.maskgit.schedule import masked_share

SEEDS = [5, 6, 7, 8]
NEGATIVE = torch.tensor([[3, 1, 0, 0, 0]]).expand(4, -1)


def drawn(model: MaskGit, batch: TokenBatch, seeds: Sequence[int] = SEEDS, **how: Any) -> torch.Tensor:
    editing = {name: how.pop(name) for name in ("codes", "redraw", "progress") if name in how}
    options = MaskGitSampling(**{"timesteps": 6, "topk_filter_thres": 0.4} | how)
    return model.generate_codes(batch.text, batch.text_mask, options=options, seeds=seeds, extra=batch.extra, **editing)


def masked_counts(count: int, timesteps: int, schedule: Schedule) -> list[int]:
    """How many of `count` codes are masked before each step: all before the first, one before the last."""
    shares = masked_share(torch.linspace(0, 1, timesteps), schedule)
    return [max(int(count * share), 1) for share in shares.tolist()]


def test_the_slow_loop_masks_as_many_codes_as_the_original():
    plan = [256, 254, 251, 246, 238, 229, 217, 204, 189, 172, 154, 134, 114, 92, 70, 47, 23, 1]
    assert masked_counts(256, 18, "cosine") == plan and masked_counts(256, 1, "cosine") == [256]


@torch.no_grad()
def slow(
    model: MaskGit, batch: TokenBatch, how: MaskGitSampling, critic: bool = False, remask: bool = False
) -> torch.Tensor:
    """The original's loop; with D24 and D25 as they should be."""
    noise, every = SeededNoise(SEEDS, how.timesteps), torch.arange(COUNT).expand(4, -1)
    ids, scores, embed = torch.full((4, COUNT), CODES), torch.zeros(4, COUNT), None
    net, vocab = model.transformer, torch.arange(CODES).expand(4, COUNT, -1)
    steps = how.timesteps
    for step, number in enumerate(masked_counts(COUNT, steps, model.config.noise_schedule)):
        left = (steps - 1 - step) / steps
        ids = ids.scatter(1, scores.topk(number, dim=-1).indices, CODES)
        context = net.context(inputs(model, batch))
        hidden = net(ids, context, embed)
        null = net(ids, net.text_hidden(context, torch.zeros(4, dtype=torch.bool)), embed)
        found, scale = net.to_logits(hidden), how.scale_at(step, steps)
        if scale != 1:
            found = net.to_logits(null) + (found - net.to_logits(null)) * scale
        embed = hidden if model.config.self_cond else None
        kept = -(-round((1 - how.topk_filter_thres) * CODES * 1e6) // 10**6)
        least = found.topk(kept, dim=-1).values[..., -1:]
        filtered = found.masked_fill(found < least, -torch.inf)
        temperature = max(how.temperature * left, 1e-10)
        pred = (filtered / temperature + noise.gumbel(step, every, vocab)).argmax(-1)
        was_masked = ids == CODES
        ids = torch.where(was_masked, pred, ids)
        if critic:
            scores = judged(model, batch, ids, how.scale_at(step, steps))
            scores = scores + (noise.uniform(step, "critic", COUNT) - 0.5) * how.critic_noise_scale * left
        else:
            scores = 1 - found.softmax(-1).gather(2, ids[..., None])[..., 0]
            scores = scores if remask else scores.masked_fill(~was_masked, -1e5)
    return ids.unflatten(1, GRID)


def judged(model: MaskGit, batch: TokenBatch, ids: torch.Tensor, scale: float) -> torch.Tensor:
    own = model.config.self_token_critic
    net = model.transformer if own else model.token_critic
    head = model.token_critic.to_pred if own else net.to_logits
    context = net.context(inputs(model, batch))
    seen = [net.text_hidden(context, torch.full((4,), keep)) for keep in (True, False)]
    cond, null = (head(net(ids, one))[..., 0] for one in seen)
    return null + (cond - null) * scale


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, {}),
        ({}, {"cond_scale": 1.0}),
        ({}, {"cond_scale": 6.0, "cond_scale_schedule": "power", "cond_scale_interval": (0.1, 0.7)}),
        ({"self_cond": True, "noise_schedule": "linear"}, {}),
        (LOWRES, {"timesteps": 4}),
        ({"lowres": {"image_grid": (2, 2), "layout": "encoder"}}, {}),
        ({}, {"temperature": 0.0}),
        ({}, {"topk_filter_thres": 0.0, "timesteps": 1}),
    ],
)
def test_drawing_where_codes_are_masked_alone_equals_the_seeds_full_passes(options, how):
    model, batch = sharp(**options), make_batch()
    how = {"cond_scale": 3.0, "timesteps": 6, "topk_filter_thres": 0.4} | how
    assert torch.equal(drawn(model, batch, **how), slow(model, batch, MaskGitSampling(**how)))


@pytest.mark.parametrize("options", [SEPARATE, {"self_token_critic": True}])
def test_critics_judge_under_guidance(options):
    model, batch = sharp(**options), make_batch()
    how = {"cond_scale": 4.0, "timesteps": 6, "topk_filter_thres": 0.4}
    found = drawn(model, batch, **how)
    assert torch.equal(found, slow(model, batch, MaskGitSampling(**how), critic=True))
    ids = found.flatten(1)
    with torch.no_grad():
        assert not torch.allclose(judged(model, batch, ids, 1.0), judged(model, batch, ids, 4.0), atol=1e-3)
    without = drawn(model, batch, force_not_use_token_critic=True, **how)
    assert torch.equal(without, slow(model, batch, MaskGitSampling(**how))) and not torch.equal(without, found)
    assert not torch.equal(found, drawn(model, batch, critic_noise_scale=100.0, **how))


def test_codes_that_may_be_masked_again_are_scored_by_what_they_are():
    model, batch = sharp(no_mask_token_prob=0.2), make_batch()
    how = {"cond_scale": 2.0, "timesteps": 6, "topk_filter_thres": 0.4}
    found = drawn(model, batch, can_remask_prev_masked=True, **how)
    assert torch.equal(found, slow(model, batch, MaskGitSampling(**how), remask=True))
    assert not torch.equal(found, drawn(model, batch, **how))
    with pytest.raises(ConfigError, match="no_mask_token_prob=0"):
        drawn(sharp(), batch, can_remask_prev_masked=True)


def test_a_negative_prompt_is_guided_away_from():
    model, batch = sharp(), make_batch()
    negative = {"negative.text": NEGATIVE, "negative.text_mask": NEGATIVE > 0}
    found = drawn(model, replace(batch, extra=negative), timesteps=1, temperature=0.0, cond_scale=2.5)
    other = replace(batch, text=NEGATIVE, text_mask=NEGATIVE > 0)
    with torch.no_grad():
        ids = torch.full((4, COUNT), CODES)
        away, towards = (logits(model, one, ids) for one in (other, batch))
        wanted = (away + (towards - away) * 2.5).argmax(-1)
    assert torch.equal(found.flatten(1), wanted)
    assert not torch.equal(found, drawn(model, batch, timesteps=1, temperature=0.0, cond_scale=2.5))
    with pytest.raises(ConfigError, match=r"got \['text_mask'\]; give negative\.text or"):
        drawn(model, replace(batch, extra={"negative.text_mask": NEGATIVE > 0}))
    with pytest.raises(ConfigError, match="is a caption"):
        drawn(model, batch, negative_prompt="a ring")


def test_negative_embeddings_may_have_another_width_of_words_and_judge_too():
    model = sharp(condition={"kind": "embeddings", "width": 12}, self_token_critic=True)
    stream = rng.generator(0, "states")
    told_states, against = (torch.randn(4, words, 12, generator=stream) for words in (3, 5))
    extra = {TEXT_EMBEDS: told_states, TEXT_EMBEDS_MASK: torch.ones(4, 3, dtype=torch.bool)}
    batch = replace(make_batch(), extra=extra)
    plain = drawn(model, batch)
    more = {f"negative.{TEXT_EMBEDS}": against, f"negative.{TEXT_EMBEDS_MASK}": torch.ones(4, 5, dtype=torch.bool)}
    assert not torch.equal(plain, drawn(model, replace(batch, extra=extra | more)))


def test_temperature_zero_takes_the_most_likely_in_any_precision():
    batch = make_batch()
    for dtype in (torch.float32, torch.bfloat16):
        model = sharp().to(dtype)
        with torch.no_grad():
            wanted = logits(model, batch, torch.full((4, COUNT), CODES)).argmax(-1)
        found = drawn(model, batch, timesteps=1, cond_scale=1.0, temperature=0.0)
        assert (found.flatten(1) == wanted).float().mean() > 0.97


def test_a_caption_with_its_seed_is_the_same_image_in_any_batch():
    model, batch = sharp(self_token_critic=True), make_batch()
    whole = drawn(model, batch)
    alone = batch.split(4)[2]
    assert torch.equal(whole[2:3], drawn(model, alone, seeds=SEEDS[2:3]))
    assert not torch.equal(whole, drawn(model, batch, seeds=[1, 2, 3, 4]))
    with pytest.raises(ConfigError, match="3 seeds for 4 captions"):
        drawn(model, batch, seeds=[1, 2, 3])


def test_guidance_may_grow_over_the_steps():
    model, batch = sharp(), make_batch()
    constant, ramped = drawn(model, batch, cond_scale=6.0), drawn(model, batch, cond_scale=6.0, cond_scale_start=1.0)
    assert not torch.equal(constant, ramped)
    assert torch.equal(constant, drawn(model, batch, cond_scale=6.0, cond_scale_start=6.0))


def test_guidance_changes_what_is_drawn_and_leaves_the_prompt_as_it_was():
    model, batch = sharp(), make_batch()
    before = batch.text.clone()
    assert not torch.equal(drawn(model, batch, cond_scale=1.0), drawn(model, batch, cond_scale=8.0))
    assert torch.equal(batch.text, before)


def test_top_p_draws_from_the_nucleus_only():
    model, batch = sharp(), make_batch()
    greedy = drawn(model, batch, timesteps=2, temperature=0.0)
    assert torch.equal(greedy, drawn(model, batch, timesteps=2, top_p=1e-6))
    assert not torch.equal(greedy, drawn(model, batch, timesteps=2, top_p=0.99, topk_filter_thres=0.0, cond_scale=1.0))


def test_choice_temperature_changes_the_order_in_which_codes_are_fixed():
    model, batch = sharp(), make_batch()
    orders = [drawn(model, batch, choice_temperature=t, temperature=0.0) for t in (0.0, 20.0)]
    assert not torch.equal(*orders)


def test_text_keys_and_values_are_computed_once_and_both_branches_in_one_batch():
    model, batch, seen = sharp(), make_batch(), {"memory": 0, "rows": []}
    layer = model.transformer.transformer_blocks.layers[0]
    layer.cross_attn.to_kv.register_forward_hook(lambda *_: seen.update(memory=seen["memory"] + 1))
    layer.attn.to_q.register_forward_hook(lambda _, x, __: seen["rows"].append(len(x[0])))
    drawn(model, batch)
    assert seen == {"memory": 1, "rows": [8] * 6}
    seen["rows"].clear()
    drawn(model, batch, cond_scale=1.0)
    assert seen["rows"] == [4] * 6, "no second branch where guidance has no effect"


def test_inpainting_changes_the_region_alone_and_sees_the_rest():
    model, batch = sharp(), make_batch()
    region = torch.zeros(4, *GRID, dtype=torch.bool)
    region[0, 1:, 2:], region[1, 0, 0], region[2] = True, True, True
    found = drawn(model, batch, codes=batch.codes, redraw=region)
    assert torch.equal(found[~region], batch.codes[~region]) and (found < CODES).all()
    assert not torch.equal(found[2], batch.codes[2])
    # The region of row 2 is the whole image: the same as drawing it from nothing.
    assert torch.equal(found[2], drawn(model, batch)[2])
    other = drawn(model, batch, codes=(batch.codes + 1) % CODES, redraw=region)
    assert not torch.equal(found[region][:4], other[region][:4]), "the surroundings matter"


def test_mask_free_editing_redraws_a_share_again_and_again():
    model, batch = sharp(), make_batch()
    one = drawn(model, batch, codes=batch.codes, edit_iterations=1, edit_rate=0.25)
    assert ((one != batch.codes).flatten(1).sum(1) <= 3).all()
    many = drawn(model, batch, codes=batch.codes, edit_iterations=8, edit_rate=0.25)
    assert (many != batch.codes).float().mean() > (one != batch.codes).float().mean()


def test_editing_without_something_to_edit_is_refused():
    model, batch = sharp(), make_batch()
    region = torch.ones(4, *GRID, dtype=torch.bool)
    for how in ({"redraw": region}, {"edit_iterations": 3}):
        with pytest.raises(ConfigError, match="give its codes"):
            drawn(model, batch, **how)
    with pytest.raises(ConfigError, match="would stay as they are"):
        drawn(model, batch, codes=batch.codes)


def test_progress_is_told_after_each_step():
    seen: list[tuple[int, int]] = []
    drawn(sharp(), make_batch(), timesteps=3, progress=lambda step, steps: seen.append((step, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_evaluation_mode_and_gradients_are_as_before():
    model = sharp(dropout=0.5, **LOWRES)
    model.train()
    model.reader.eval()
    assert not drawn(model, make_batch()).is_floating_point()
    assert model.training and not model.reader.training and model.transformer.training


def test_super_resolution_draws_what_its_low_resolution_says():
    model, batch = sharp(**LOWRES), make_batch()
    other = replace(batch, extra={LOWRES_CODES: (batch.extra[LOWRES_CODES] + 1) % CODES})
    assert not torch.equal(drawn(model, batch), drawn(model, other))


def test_codes_of_the_vocabulary_are_drawn_and_never_the_mask():
    found = drawn(make(), make_batch(), temperature=5.0, topk_filter_thres=0.0)
    assert found.min() >= 0 and found.max() < CODES and WORDS < CODES
