"""Drawing images and captions from DALL-E, against slow oracles that recompute everything at each step."""

from collections.abc import Sequence

import pytest
import torch
from test_dalle_model import CODES, GRID, TEXT, WORDS, make, make_batch

from tokscale.base.errors import ConfigError
from tokscale.models.dalle import DALLE, DALLESampling
from tokscale.nn.sampling import gumbel_sample, sample_noise, top_k

ALL_KINDS = {"attn_types": ("full", "axial_row", "axial_col", "conv_like"), "depth": 4}
IMAGE = GRID[0] * GRID[1]


def sharp(**options: object) -> DALLE:
    """A model whose distributions are far from uniform, so that a wrong logit changes what is drawn."""
    model = make(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale" in name:
                parameter.fill_(0.7)
            elif "head" in name:
                parameter.mul_(4)
    return model


@torch.no_grad()
def slow_codes(
    model: DALLE, text: torch.Tensor, prime: torch.Tensor, options: DALLESampling, seeds: Sequence[int]
) -> torch.Tensor:
    """The original's loop without a cache: a full pass, or two, for every code."""
    codes = prime
    for at in range(prime.shape[1], IMAGE):
        logits = model.logits(text, codes)[:, -1, WORDS + TEXT :].float()
        if (scale := options.scale_at(at, IMAGE)) != 1:
            null = model.logits(torch.zeros_like(text), codes)[:, -1, WORDS + TEXT :].float()
            logits = null + (logits - null) * scale
        noise = sample_noise(seeds, f"code/{at}", CODES)
        drawn = gumbel_sample(top_k(logits, options.filter_thres), options.temperature, noise)
        codes = torch.cat([codes, drawn[:, None]], dim=1)
    return codes.unflatten(1, GRID)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("options", [{}, ALL_KINDS, {"rotary_emb": False, "shift_tokens": False}])
def test_cached_guided_decoding_equals_full_passes(options, scale):
    model, batch, seeds = sharp(**options), make_batch(), [5, 6, 7]
    how = DALLESampling(cond_scale=scale, filter_thres=0.3)
    codes = model.generate_codes(batch.text, batch.text_mask, options=how, seeds=seeds)
    assert torch.equal(codes, slow_codes(model, batch.text, torch.zeros(3, 0, dtype=torch.long), how, seeds))


def test_guidance_follows_its_schedule():
    model, batch, seeds = sharp(), make_batch(), [5, 6, 7]
    how = DALLESampling(cond_scale=6.0, cond_scale_schedule="cosine", cond_scale_interval=(0.2, 0.9), filter_thres=0.3)
    codes = model.generate_codes(batch.text, batch.text_mask, options=how, seeds=seeds)
    assert torch.equal(codes, slow_codes(model, batch.text, torch.zeros(3, 0, dtype=torch.long), how, seeds))
    constant = DALLESampling(cond_scale=6.0, filter_thres=0.3)
    assert not torch.equal(codes, model.generate_codes(batch.text, batch.text_mask, options=constant, seeds=seeds))


def test_guidance_changes_what_is_drawn():
    model, batch, seeds = sharp(), make_batch(), [5, 6, 7]
    drawn = [
        model.generate_codes(batch.text, batch.text_mask, options=DALLESampling(cond_scale=scale), seeds=seeds)
        for scale in (1.0, 8.0)
    ]
    assert not torch.equal(*drawn)


def test_guidance_leaves_the_prompt_as_it_was():
    model, batch = sharp(), make_batch()
    before = batch.text.clone()
    model.generate_codes(batch.text, batch.text_mask, options=DALLESampling(cond_scale=3.0), seeds=[1, 2, 3])
    assert torch.equal(batch.text, before)


def test_every_position_is_computed_once(monkeypatch):
    model, batch = sharp(), make_batch()
    lengths: list[int] = []
    read = model.read
    monkeypatch.setattr(model, "read", lambda x, *rest: lengths.append(x.shape[1]) or read(x, *rest))
    model.generate_codes(batch.text, batch.text_mask, options=DALLESampling(), seeds=[1, 2, 3])
    assert lengths == [TEXT + 1] + [1] * (IMAGE - 1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_priming_with_an_image_equals_full_passes(scale):
    model, batch, seeds = sharp(**ALL_KINDS), make_batch(), [1, 2, 3]
    how = DALLESampling(cond_scale=scale)
    codes = model.generate_codes(batch.text, batch.text_mask, options=how, seeds=seeds, img=batch.codes)
    kept = int(0.4375 * IMAGE)
    assert kept == 5
    prime = batch.codes.flatten(1)[:, :kept]
    assert torch.equal(codes.flatten(1)[:, :kept], prime)
    assert torch.equal(codes, slow_codes(model, batch.text, prime, how, seeds))


def test_priming_keeps_as_many_codes_as_asked():
    model, batch = sharp(), make_batch()
    for kept in (0, 1, IMAGE - 1):
        how = DALLESampling(num_init_img_tokens=kept)
        codes = model.generate_codes(batch.text, batch.text_mask, options=how, seeds=[1, 2, 3], img=batch.codes)
        assert torch.equal(codes.flatten(1)[:, :kept], batch.codes.flatten(1)[:, :kept])
    with pytest.raises(ConfigError, match="leaves none to draw"):
        how = DALLESampling(num_init_img_tokens=IMAGE)
        model.generate_codes(batch.text, batch.text_mask, options=how, seeds=[1, 2, 3], img=batch.codes)


def test_top_k_counts_image_codes_only():
    model, batch = sharp(), make_batch()
    how = DALLESampling(filter_thres=0.999)  # of 13 codes one is left; of the joint vocabulary it would be 13
    greedy = DALLESampling(temperature=0)
    drawn = [model.generate_codes(batch.text, batch.text_mask, options=o, seeds=[1, 2, 3]) for o in (how, greedy)]
    assert torch.equal(*drawn)


def test_temperature_zero_takes_the_most_likely():
    model, batch = sharp(), make_batch()
    codes = model.generate_codes(batch.text, batch.text_mask, options=DALLESampling(temperature=0), seeds=[1, 2, 3])
    for at in range(IMAGE):
        logits = model.logits(batch.text, codes.flatten(1)[:, :at])[:, -1, WORDS + TEXT :]
        assert torch.equal(codes.flatten(1)[:, at], logits.argmax(-1))


def test_noise_is_fine_enough_in_bfloat16():
    model, rows = make(num_image_tokens=4096).to(torch.bfloat16).eval(), 64
    with torch.no_grad():
        model.image_head.weight.zero_()
        model.image_head.bias.zero_()
    text = torch.ones(rows, TEXT, dtype=torch.long)
    how = DALLESampling(filter_thres=0)
    codes = model.generate_codes(text, text == 1, options=how, seeds=range(rows))
    # Uniform over 4096 codes: a mean of 2048 with a standard error of 43. Noise in bfloat16 gave about 130.
    assert 1850 < codes.float().mean() < 2250


def test_top_p_draws_from_the_nucleus_only():
    model, batch = sharp(), make_batch()
    how = DALLESampling(filter_thres=0, top_p=1e-6)
    greedy = DALLESampling(temperature=0)
    drawn = [model.generate_codes(batch.text, batch.text_mask, options=o, seeds=[1, 2, 3]) for o in (how, greedy)]
    assert torch.equal(*drawn)


def test_a_caption_with_its_seed_is_the_same_image_in_any_batch():
    model, batch, how = sharp(**ALL_KINDS), make_batch(6), DALLESampling(cond_scale=2.0)
    seeds = [3, 1, 4, 1, 5, 9]
    together = model.generate_codes(batch.text, batch.text_mask, options=how, seeds=seeds)
    alone = [
        model.generate_codes(batch.text[i, None], batch.text_mask[i, None], options=how, seeds=[seeds[i]])
        for i in range(6)
    ]
    assert (together == torch.cat(alone)).float().mean() >= 0.99
    other = model.generate_codes(batch.text, batch.text_mask, options=how, seeds=[seed + 10 for seed in seeds])
    assert (together == other).float().mean() < 0.9


def test_sampling_puts_every_mode_back_also_after_an_error():
    model, batch = sharp().train(), make_batch()
    model.stack.eval()
    model.generate_codes(batch.text, batch.text_mask, options=DALLESampling(), seeds=[1, 2, 3])
    assert model.training and model.text_head.training and not model.stack.training
    model.image_head.forward = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        model.generate_codes(batch.text, batch.text_mask, options=DALLESampling(), seeds=[1, 2, 3])
    assert model.training and not model.stack.training and torch.is_grad_enabled()


def test_one_seed_per_caption_is_asked_for():
    model, batch = sharp(), make_batch()
    with pytest.raises(ConfigError, match="2 seeds for 3 captions"):
        model.generate_codes(batch.text, batch.text_mask, options=DALLESampling(), seeds=[1, 2])


class Pixels:
    """An image tokenizer of one pixel per code, and a reranker that likes bright images."""

    num_tokens, image_size, channels, code_shape, fingerprint = CODES, 4, 1, GRID, "pixels"

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, 0].long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes[:, None].to(torch.uint8)

    def score(self, text: torch.Tensor, text_mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((1, 2, 3))


def test_images_are_decoded_and_scored():
    model, batch, pixels = sharp(), make_batch(), Pixels()
    how, seeds = DALLESampling(), [1, 2, 3]
    made = model.generate_images(batch.text, batch.text_mask, pixels, options=how, seeds=seeds, clip=pixels)
    assert torch.equal(made.codes, model.generate_codes(batch.text, batch.text_mask, options=how, seeds=seeds))
    assert torch.equal(made.pixels[:, 0].long(), made.codes)
    assert torch.equal(made.scores, made.codes.float().mean((1, 2)))
    unscored = model.generate_images(batch.text, batch.text_mask, pixels, options=how, seeds=seeds)
    assert unscored.scores is None


def test_priming_takes_pixels_or_codes():
    model, batch, pixels = sharp(), make_batch(), Pixels()
    given = [
        model.generate_images(
            batch.text, batch.text_mask, pixels, options=DALLESampling(), seeds=[1, 2, 3], img=img
        ).codes
        for img in (batch.codes, pixels.decode(batch.codes))
    ]
    assert torch.equal(*given)


class Letters:
    """A text tokenizer of one id per letter."""

    num_tokens, fingerprint = WORDS, "letters"

    def encode(self, captions: Sequence[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([[ord(c) - 96 for c in caption] + [0] * (length - len(caption)) for caption in captions])
        return ids, ids != 0

    def decode(self, ids: torch.Tensor) -> list[str]:
        return ["".join(chr(96 + i) for i in row if i) for row in ids.tolist()]


@torch.no_grad()
def slow_text(model: DALLE, prefix: torch.Tensor, options: DALLESampling, seeds: Sequence[int]) -> torch.Tensor:
    """Captions from full training passes: what follows position i is read off a complete sequence."""
    text = prefix.clone()
    for at in range(TEXT):
        # The training pass: a whole caption and image. Causality makes what comes later irrelevant.
        logits = model.logits(text, torch.zeros(len(text), IMAGE, dtype=torch.long))[:, at].float()
        legal = torch.cat([logits[:, 1:WORDS], logits[:, WORDS + at, None]], dim=1)
        noise = sample_noise(seeds, f"text/{at}", WORDS)
        drawn = gumbel_sample(top_k(legal, options.filter_thres), options.temperature, noise) + 1
        ended = (text[:, at - 1] == 0) if at else torch.zeros(len(text), dtype=torch.bool)
        drawn = torch.where(ended | (drawn == WORDS), 0, drawn)
        text[:, at] = torch.where(prefix[:, at] != 0, prefix[:, at], drawn)
    return text


@pytest.mark.parametrize("options", [{}, {"rotary_emb": False}, ALL_KINDS])
def test_captions_see_the_start_token_positions_and_shift_of_training(options):
    model, how, seeds = sharp(**options), DALLESampling(filter_thres=0.2), list(range(8))
    prompts = ["", "ab", "c", "abcd", "", "j", "abcde", "b"]
    ids, captions = model.generate_texts(Letters(), prompts, options=how, seeds=seeds)
    assert torch.equal(ids, slow_text(model, Letters().encode(prompts, TEXT)[0], how, seeds))
    assert captions == Letters().decode(ids)
    assert all(caption.startswith(prompt) for caption, prompt in zip(captions, prompts, strict=True))
    assert 0 <= ids.min() and ids.max() < WORDS


def test_a_caption_ends_where_padding_is_drawn():
    model = sharp()
    with torch.no_grad():
        model.text_head.bias[WORDS + 2] = 1e4  # the padding of the third place
    ids, _ = model.generate_texts(Letters(), ["", "abcd"], options=DALLESampling(), seeds=[1, 2])
    assert (ids[0, :2] > 0).all() and not ids[0, 2:].any()
    assert ids[1, :4].tolist() == [1, 2, 3, 4]


def test_padding_is_never_drawn_as_a_word():
    model = sharp()
    with torch.no_grad():
        model.text_head.bias[0] = 1e4  # the start token's row, whose id is also the tokenizer's padding
        model.text_head.bias[WORDS:] = -1e4
    ids, _ = model.generate_texts(Letters(), ["", "b"], options=DALLESampling(), seeds=[1, 2])
    assert (ids > 0).all()
