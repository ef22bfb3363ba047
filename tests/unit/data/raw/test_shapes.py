import itertools

import pytest
import torch

from tokscale.base.errors import DataError
from tokscale.data.raw.shapes import Scene, Thing, caption, evaluation_prompts, parse, render, sample_scene
from tokscale.data.raw.shapes.grammar import COLOURS, PLACES, RELATIONS, SHAPES, SIZES
from tokscale.data.raw.shapes.render import RADIUS, RGB, coverage


def test_every_caption_parses_back_to_its_scene():
    things = [Thing(*words) for words in itertools.product(SIZES, COLOURS, SHAPES)]
    scenes = [Scene((thing,), place=place) for thing in things for place in PLACES]
    scenes += [Scene((a, b), relation=relation) for a in things[::7] for b in things[::11] for relation in RELATIONS]
    assert all(parse(caption(scene)) == scene for scene in scenes)
    assert len({caption(scene) for scene in scenes}) == len(scenes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a small red circle",
        "a small red circle at the top left ",
        "a tiny red circle at the top left",
    ],
)
def test_other_text_is_refused_with_an_example(text):
    with pytest.raises(DataError, match="say it like 'a small red circle at the top left'"):
        parse(text)


def test_a_scene_depends_on_its_arguments_alone():
    scenes = [sample_scene(3, index) for index in range(50)]
    assert [sample_scene(3, index) for index in reversed(range(50))] == scenes[::-1]
    assert [scene.jitter for scene in scenes] == [sample_scene(3, index).jitter for index in range(50)]
    assert [sample_scene(4, index) for index in range(50)] != scenes
    assert [sample_scene(3, index, "validation") for index in range(50)] != scenes


def test_two_things_never_look_the_same():
    pairs = [sample_scene(0, index, split, things=2) for index in range(200) for split in ("train", "held_out")]
    assert all((a.colour, a.shape) != (b.colour, b.shape) for a, b in (scene.things for scene in pairs))


def test_held_out_scenes_come_in_both_kinds_and_only_there():
    assert not any(sample_scene(0, index).held_out() for index in range(300))
    held_out = [sample_scene(0, index, "held_out") for index in range(300)]
    assert all(scene.held_out() for scene in held_out)
    assert {len(scene.things) for scene in held_out} == {1, 2}


def test_evaluation_prompts_are_distinct_and_mixed():
    for split in ("seen", "held_out"):
        prompts = evaluation_prompts(split, 100)
        assert len(set(prompts)) == 100
        assert sum(parse(prompt).relation is not None for prompt in prompts) == 50
        assert {parse(prompt).held_out() for prompt in prompts} == {split == "held_out"}


def test_the_same_scene_gives_the_same_image_and_jitter_another():
    scene = sample_scene(0, 1)
    assert torch.equal(render(scene), render(scene))
    assert not torch.equal(render(scene), render(parse(caption(scene))))
    assert render(scene, 48).shape == (3, 48, 48)


def test_an_image_is_white_and_one_flat_colour_with_soft_edges():
    image = render(parse("a large blue square at the centre"))
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert tuple(image[:, 16, 16].tolist()) == RGB["blue"]
    half = RADIUS["large"] * 32 * 0.96
    covered = (255 - image.double()).sum((1, 2)) / (255 - torch.tensor(RGB["blue"]).double())
    torch.testing.assert_close(covered, torch.full((3,), (2 * half) ** 2).double(), rtol=0.03, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_agrees_with_a_much_finer_rendering(shape):
    coarse = coverage(shape, 6.3, 9.2, 8.9, 18, 18)
    fine = coverage(shape, 6.3, 9.2, 8.9, 18, 18, supersampling=32)
    assert (coarse - fine).abs().max() < 0.2
    assert abs(coarse.sum() - fine.sum()) / fine.sum() < 0.03


def test_no_two_things_of_a_relation_touch():
    for relation in RELATIONS:
        for index in range(10):
            scene = sample_scene(index, 0, things=2)
            big = Scene(tuple(Thing("large", t.colour, "square") for t in scene.things), None, relation, scene.jitter)
            alone = [Scene((thing,), "centre", None, big.jitter[i : i + 1]) for i, thing in enumerate(big.things)]
            ink = [(render(one) != 255).any(0).sum().item() for one in alone]
            assert (render(big) != 255).any(0).sum().item() >= sum(ink) - 16
