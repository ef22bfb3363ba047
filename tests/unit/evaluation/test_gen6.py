"""The six questions: what they ask, what counts as an answer, and how often their judge is right."""

import dataclasses
from collections import Counter

import pytest

from tokscale.base.errors import DataError
from tokscale.data.raw.shapes import parse
from tokscale.data.raw.shapes.grammar import Thing
from tokscale.evaluation import gen6
from tokscale.evaluation.gen6 import Question, shows
from tokscale.evaluation.shapes_judge import Reading, SeenThing

RED_CIRCLE = SeenThing("small", "red", "circle", 0.25, 0.5, 1.0)
BLUE_RING = SeenThing("large", "blue", "ring", 0.75, 0.5, 1.0)
GREEN_CROSS = SeenThing("medium", "green", "cross", 0.5, 0.8, 1.0)
ASKED = (Thing("small", "red", "circle"), Thing("large", "blue", "ring"))


def changed(thing: SeenThing, **values) -> SeenThing:
    return dataclasses.replace(thing, **values)


def test_there_are_553_different_prompts_with_the_numbers_of_geneval():
    asked = gen6.questions(0)
    assert len({question.text for question in asked}) == len(asked) == 553
    assert Counter(question.task for question in asked) == {
        "one_thing": 80,
        "two_things": 99,
        "counting": 80,
        "colours": 94,
        "position": 100,
        "colour_by_thing": 100,
    }
    assert gen6.questions(0) == asked != gen6.questions(1)
    assert all(question.scene is None or parse(question.text) == question.scene for question in asked)
    counted = {question.text.split()[0] for question in asked if question.task == "counting"}
    assert counted == {"two", "three", "four"}
    assert Question("counting", (Thing("small", "red", "cross"),), number=3).text == "three small red crosses"


BLUE_CIRCLE, CYAN_CIRCLE, RED_RING = (
    changed(RED_CIRCLE, colour="blue"),
    changed(RED_CIRCLE, colour="cyan"),
    changed(BLUE_RING, colour="red"),
)
ANSWERS = {
    "one_thing": ([[BLUE_CIRCLE], [GREEN_CROSS, RED_CIRCLE]], [[BLUE_RING], []]),
    "two_things": ([[BLUE_RING, CYAN_CIRCLE]], [[RED_CIRCLE], [RED_CIRCLE, GREEN_CROSS]]),
    "counting": ([[RED_CIRCLE] * 2, [RED_CIRCLE, GREEN_CROSS, RED_CIRCLE]], [[RED_CIRCLE], [RED_CIRCLE] * 3]),
    "colours": ([[RED_CIRCLE], [changed(RED_CIRCLE, size="large"), BLUE_RING]], [[BLUE_CIRCLE], [RED_RING]]),
    "position": ([[BLUE_RING, CYAN_CIRCLE]], [[changed(RED_CIRCLE, x=0.9), BLUE_RING], [RED_CIRCLE]]),
    "colour_by_thing": ([[RED_CIRCLE, BLUE_RING]], [[BLUE_CIRCLE, RED_RING], [RED_CIRCLE]]),
}


@pytest.mark.parametrize("task", ANSWERS)
def test_a_task_looks_only_at_what_it_is_about(task):
    right, wrong = ANSWERS[task]
    two = task in ("two_things", "position", "colour_by_thing")
    question = Question(
        task, ASKED if two else ASKED[:1], 2 if task == "counting" else 1, relation="left of" if two else None
    )
    assert [shows(question, Reading(tuple(things), 1.0)) for things in right] == [True] * len(right)
    assert [shows(question, Reading(tuple(things), 1.0)) for things in wrong] == [False] * len(wrong)


def test_the_judge_is_right_about_rendered_answers_and_rendered_mistakes():
    found = gen6.judge_accuracy(0)
    assert found.keys() == set(gen6.TASKS) and min(found.values()) >= 0.99, found


def test_rendered_mistakes_are_wrong_in_what_the_task_is_about_and_in_nothing_else():
    for question in gen6.questions(3)[::10]:
        right, wrong = (gen6.answer(question, 3, right=told) for told in (True, False))
        if question.task == "counting":
            assert len(right) == question.number != len(wrong) and {p.thing for p in wrong} == {p.thing for p in right}
            continue
        assert len(right) == len(wrong)
        looks = [sorted((p.thing.colour, p.thing.shape) for p in things) for things in (right, wrong)]
        assert (looks[0] == looks[1]) == (question.task == "position")


def test_scores_are_means_with_intervals_that_resample_prompts():
    asked = gen6.questions(0)
    half = [[number % 2 == 0] * 4 for number in range(553)]
    found = gen6.score(asked, half, seed=0)
    one = found["one_thing"]
    assert one["accuracy"] == 0.5 and one["prompts"] == 80 and one["sayable"] == 1.0 and 0.4 < one["shown"] < 0.8
    # Prompts whose four images agree tell no more than one image each: binomial with 80 draws, not 320.
    low, high = one["interval"]
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 80) ** 0.5, rel=0.15)
    assert found["counting"]["sayable"] == found["counting"]["shown"] == 0.0
    assert found["overall"]["accuracy"] == pytest.approx(sum(found[task]["accuracy"] for task in gen6.TASKS) / 6)
    width = found["overall"]["interval"][1] - found["overall"]["interval"][0]
    assert 0 < width < high - low and found["images_per_prompt"] == 4
    assert gen6.score(asked, half, seed=0) == found
    none = gen6.score(asked, [[False]] * 553)
    assert none["overall"] == {"accuracy": 0.0, "interval": [0.0, 0.0]}


def test_a_question_without_its_images_is_refused():
    asked = gen6.questions(0)
    with pytest.raises(DataError, match="same number of images"):
        gen6.score(asked, [[True]] * 552 + [[]])
    with pytest.raises(DataError, match="no prompt of the task colour_by_thing"):
        gen6.score(asked[:453], [[True]] * 453)
