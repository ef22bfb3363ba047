import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tokscale.base.rng import generator
from tokscale.data.raw.shapes import (
    caption,
    evaluation_prompts,
    parse,
    render,
    sample_scene,
)
from tokscale.data.raw.shapes.grammar import PLACES
from tokscale.evaluation.shapes_judge import Reading, SeenThing, compare, read_scenes, score


def images(count: int, seed: int = 5):
    scenes = [sample_scene(seed, index, "held_out" if index % 3 == 0 else "train") for index in range(count)]
    return scenes, torch.stack([render(scene) for scene in scenes])


def right(scenes, pixels) -> float:
    return sum(compare(s, reading)["exact"] for s, reading in zip(scenes, read_scenes(pixels), strict=True)) / len(
        scenes
    )


def blurred(pixels, sigma: float):
    kernel = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * sigma**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(pixels.float(), [3] * 4, mode="replicate")
    return F.conv2d(padded, kernel.expand(3, 1, 7, 7), groups=3).round().to(torch.uint8)


def noise(name: str, *shape: int):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(0, name))


def test_reads_rendered_images_as_they_were_asked_for():
    assert right(*images(2000)) >= 0.995


def test_reads_soft_and_noisy_images():
    scenes, pixels = images(100, seed=6)
    assert right(scenes, blurred(pixels, 1.0)) >= 0.99
    grain = 10 * torch.randn(pixels.shape, generator=generator(0, "grain"))
    assert right(scenes, (pixels + grain).round().clamp(0, 255).to(torch.uint8)) >= 0.99


def test_reads_other_sizes():
    scenes = [sample_scene(8, index) for index in range(40)]
    assert right(scenes, torch.stack([render(scene, 64) for scene in scenes])) == 1
    assert right(scenes, torch.stack([render(scene, 128) for scene in scenes])) == 1


@pytest.mark.parametrize(
    "pixels",
    [
        noise("fine", 40, 3, 32, 32),
        F.interpolate(noise("coarse", 40, 3, 8, 8).float(), (32, 32), mode="bilinear").to(torch.uint8),
        noise("faint", 20, 3, 32, 32) // 16 + 239,
        torch.full((1, 3, 32, 32), 255, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.tensor([225, 30, 35], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32),
        torch.full((1, 3, 32, 32), 128, dtype=torch.uint8),
        images(40)[1].flatten(2)[:, :, torch.randperm(1024, generator=generator(0, "pixels"))].unflatten(2, (32, 32)),
    ],
    ids=["noise", "coarse noise", "faint noise", "white", "black", "red", "grey", "shuffled pixels"],
)
def test_nothing_is_read_where_nothing_was_drawn(pixels):
    assert [reading.things for reading in read_scenes(pixels)] == [()] * len(pixels)


def test_wrong_images_are_not_read_as_asked():
    asked = parse("a small red circle at the top left")
    for wrong, attribute in {
        "a medium red circle at the top left": "size",
        "a small blue circle at the top left": "colour",
        "a small red ring at the top left": "shape",
        "a small red circle at the top centre": "position",
    }.items():
        result = compare(asked, read_scenes(render(parse(wrong))[None])[0])
        assert not result["exact"] and [key for key, ok in result.items() if not ok] == ["exact", attribute]


def test_a_superfluous_thing_is_not_exact():
    lone, extra = (
        render(parse(f"a small {look} at the {place}"))
        for look, place in [("red circle", "top left"), ("green cross", "bottom right")]
    )
    reading = read_scenes(torch.minimum(lone, extra)[None])[0]
    assert len(reading.things) == 2
    assert not compare(parse("a small red circle at the top left"), reading)["exact"]
    assert not compare(parse("a small green cross at the bottom right"), reading)["exact"]
    third = render(parse("a small blue square at the bottom left"))
    pair = render(parse("a small red ring above a small black cross"))
    assert len(read_scenes(torch.minimum(pair, third)[None])[0].things) == 3


def test_relations_bind_attributes_to_their_thing():
    reading = read_scenes(render(parse("a small red circle left of a large blue square"))[None])[0]
    assert compare(parse("a small red circle left of a large blue square"), reading)["exact"]
    assert compare(parse("a large blue square right of a small red circle"), reading)["exact"]
    assert not compare(parse("a large blue square left of a small red circle"), reading)["exact"]
    assert not compare(parse("a small blue square left of a large red circle"), reading)["exact"]
    assert not compare(parse("a small red circle above a large blue square"), reading)["relation"]


def test_score_groups_prompts_and_counts_each_attribute():
    prompts = evaluation_prompts("seen", 20) + evaluation_prompts("held_out", 20)
    pixels = torch.stack([render(parse(prompt)) for prompt in prompts])
    perfect = score(prompts, read_scenes(pixels))
    expected = dict.fromkeys(("exact", "size", "colour", "shape", "position"), 1.0) | {"count": 10}
    assert perfect["seen"] == expected and perfect["held_out"] == expected
    pair = {key: value for key, value in expected.items() if key != "position"} | {"relation": 1.0}
    assert perfect["two_objects"] == {"seen": pair, "held_out": pair}
    nothing = score(prompts, [Reading((), 0.0)] * len(prompts))
    assert nothing["seen"] == dict.fromkeys(expected, 0.0) | {"count": 10}
    assert nothing["two_objects"]["held_out"]["relation"] == 0.0


def test_score_is_a_mean_over_prompts():
    prompt = "a small red circle at the top left"
    seen = SeenThing("small", "red", "circle", *PLACES["top left"], match=1.0)
    wrong = dataclasses.replace(seen, colour="blue")
    scores = score([prompt] * 4, [Reading((thing,), 1.0) for thing in (seen, seen, seen, wrong)])
    assert scores == {
        "seen": {"exact": 0.75, "size": 1.0, "colour": 0.75, "shape": 1.0, "position": 1.0, "count": 4},
    }


def test_captions_of_the_reading_agree_with_the_scene_text():
    scenes, pixels = images(30, seed=9)
    for scene, reading in zip(scenes, read_scenes(pixels), strict=True):
        if scene.place is not None:
            thing = reading.things[0]
            assert f"a {thing.size} {thing.colour} {thing.shape} at the {thing.place}" == caption(scene)
