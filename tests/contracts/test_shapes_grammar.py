"""The grammar was fixed before any recipe was tuned. A change here makes every published prompt accuracy void."""

import hashlib

import torch

from tokscale.base.config import fingerprint
from tokscale.data.raw.shapes import caption, evaluation_prompts, parse, render, sample_scene
from tokscale.data.raw.shapes import grammar as g
from tokscale.data.raw.shapes.render import RADIUS, RGB, SIZE


def test_the_grammar_has_the_promised_breadth():
    assert (len(g.SHAPES), len(g.COLOURS), len(g.SIZES), len(g.PLACES), len(g.RELATIONS)) == (6, 8, 3, 9, 4)
    assert len(set(RGB.values())) == 8 and len(set(RADIUS.values())) == 3
    assert SIZE >= 32


def test_at_least_15_percent_of_each_kind_of_pair_is_held_out():
    assert len(g.HELD_OUT_LOOKS) / len(g.LOOKS) >= 0.15 and set(g.LOOKS) > g.HELD_OUT_LOOKS
    assert len(g.HELD_OUT_SPOTS) / len(g.SPOTS) >= 0.15 and set(g.SPOTS) > g.HELD_OUT_SPOTS


def test_every_word_is_seen_in_training():
    for position, words in enumerate((g.COLOURS, g.SHAPES)):
        assert {look[position] for look in g.SEEN_LOOKS} == set(words)
    for position, words in enumerate((g.SIZES, g.PLACES)):
        assert {spot[position] for spot in g.SEEN_SPOTS} == set(words)


def test_training_captions_keep_their_promises():
    scenes = [sample_scene(0, index) for index in range(1500)]
    assert sum(scene.relation is not None for scene in scenes) / len(scenes) >= 0.40
    looks = {(thing.colour, thing.shape) for scene in scenes for thing in scene.things}
    spots = {(scene.things[0].size, scene.place) for scene in scenes if scene.place}
    assert looks == set(g.LOOKS) - g.HELD_OUT_LOOKS
    assert spots == set(g.SPOTS) - g.HELD_OUT_SPOTS
    assert {scene.relation for scene in scenes} - {None} == set(g.RELATIONS)


def test_relations_never_draw_a_held_out_spot():
    # A thing of a relation stands at one of the nine places; there, too, no held-out size may be seen.
    used = {place for place, at in g.PLACES.items() if any(at in centres for centres in g.RELATIONS.values())}
    assert len(used) == 4 and not used & {place for _, place in g.HELD_OUT_SPOTS}


def test_the_evaluation_has_500_prompts_in_four_groups():
    prompts = [prompt for split in ("seen", "held_out") for prompt in evaluation_prompts(split, 256)]
    assert len(set(prompts)) == 512
    assert sum(parse(prompt).held_out() for prompt in prompts) == 256
    assert sum(parse(prompt).relation is not None for prompt in prompts) == 256


def test_golden_words():
    words = [g.SHAPES, g.COLOURS, g.SIZES, g.PLACES, g.RELATIONS, sorted(g.HELD_OUT_LOOKS), sorted(g.HELD_OUT_SPOTS)]
    assert fingerprint([words, RGB, RADIUS]) == GOLDEN["words"]


def test_golden_captions():
    splits = ("train", "validation", "held_out")
    lines = [caption(sample_scene(0, index, split)) for split in splits for index in range(400)]
    lines += evaluation_prompts("seen", 256) + evaluation_prompts("held_out", 256)
    assert fingerprint(lines) == GOLDEN["captions"]


def test_golden_images():
    pixels = torch.stack([render(sample_scene(0, index)) for index in range(64)])
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == GOLDEN["images"]


GOLDEN = {
    "words": "42170d45b3f6593d7aae08aeb01e88b5293f5fd070e86f2beb2945c4ff582bf1",
    "captions": "1eb969e0fe32439fea999a7b9499cb65d98b432d8b5f4d5598ac12527c33e398",
    "images": "1700cd32f7a81246f9b2685e7c2bb938680e3ebcb72b584d3c0951e8367b3e6d",
}
