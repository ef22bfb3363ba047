"""`gen6`: six questions about images of shapes, asked in the manner of GenEval (Ghosh et al. 2023, arXiv:2310.11513).

Its tasks and the numbers of their prompts are those of GenEval; its things, sentences and judge are those of the
`shapes` data set, so no number of it can stand beside one of GenEval. A sentence always says as much as the data set's
captions do; a task looks only at what it is about:

| task | a sentence | an image is right when |
|---|---|---|
| `one_thing` | a small red circle at the top left | there is a circle |
| `two_things` | a small red circle left of a large blue ring | there are a circle and a ring |
| `counting` | three small red circles | there are three circles, no more |
| `colours` | a small red circle at the top left | there is a red circle |
| `position` | a small red circle left of a large blue ring | there is a circle left of a ring |
| `colour_by_thing` | a small red circle left of a large blue ring | there are a red circle and a blue ring |

Training on `shapes` shows no more than two things and never two alike: `counting` is a question that it cannot answer.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, assert_never, get_args

import torch

from tokscale.base.errors import DataError
from tokscale.base.rng import generator
from tokscale.data.raw.shapes.grammar import (
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SHIFT,
    SIZES,
    STRETCH,
    Scene,
    Thing,
    caption,
)
from tokscale.data.raw.shapes.render import Placed, render_things
from tokscale.evaluation.shapes_judge import Reading, read_scenes, relation

Task = Literal["one_thing", "two_things", "counting", "colours", "position", "colour_by_thing"]
PROMPTS: dict[Task, int] = {
    "one_thing": 80,
    "two_things": 99,
    "counting": 80,
    "colours": 94,
    "position": 100,
    "colour_by_thing": 100,
}
"""Prompts of each task: 553 together, as many as GenEval has."""
TASKS: tuple[Task, ...] = get_args(Task)
NUMBERS = {2: "two", 3: "three", 4: "four"}
MOST_THINGS = 5
"""One more than the largest number asked for."""
RESAMPLES = 1000
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_QUADRANTS = tuple(itertools.product((0.25, 0.75), repeat=2))
_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A prompt and what its image is to show."""

    task: Task
    things: tuple[Thing, ...]
    number: int = 1
    """How many of the one thing; above 1 in `counting` alone."""
    place: str | None = None
    relation: str | None = None

    @property
    def scene(self) -> Scene | None:
        """As the data set would draw it; None for what its sentences cannot say."""
        said = self.place is not None or self.relation is not None
        return Scene(self.things, place=self.place, relation=self.relation) if said else None

    @property
    def text(self) -> str:
        """The prompt."""
        scene = self.scene
        if scene is not None:
            return caption(scene)
        thing = self.things[0]
        plural = f"{thing.shape}es" if thing.shape.endswith("s") else f"{thing.shape}s"
        return f"{NUMBERS[self.number]} {thing.size} {thing.colour} {plural}"


def questions(seed: int = 0) -> list[Question]:
    """The 553 questions, no two with the same text: a pure function of the seed."""
    found: dict[str, Question] = {}
    for task, count in PROMPTS.items():
        for attempt in itertools.count():
            question = _question(task, _noise(seed, task, attempt))
            found.setdefault(question.text, question)
            if sum(kept.task == task for kept in found.values()) == count:
                break
    return list(found.values())


def shows(question: Question, reading: Reading) -> bool:
    """Whether an image, as the judge reads it, is right; what else is in it counts in `counting` alone."""
    things, asked = reading.things, question.things
    looks = {(thing.colour, thing.shape) for thing in things}
    match question.task:
        case "one_thing" | "two_things":
            return {thing.shape for thing in asked} <= {thing.shape for thing in things}
        case "colours" | "colour_by_thing":
            return {(thing.colour, thing.shape) for thing in asked} <= looks
        case "counting":
            return sum(thing.shape == asked[0].shape for thing in things) == question.number
        case "position":
            return any(
                (a.shape, b.shape) == (asked[0].shape, asked[1].shape) and relation(a, b) == question.relation
                for a, b in itertools.permutations(things, 2)
            )
        case _:
            assert_never(question.task)


def score(asked: Sequence[Question], right: Sequence[Sequence[bool]], seed: int = 0) -> dict[str, object]:
    """Accuracy of each task and their mean, with intervals that hold 95 of 100 bootstrap resamples of the prompts.

    Args:
        asked: The questions.
        right: For each, whether each of its images is right; as many for every question.
        seed: Of the resamples.

    Returns:
        By task `accuracy`, `interval`, `prompts`, the share of them that captions of the data set can say
        (`sayable`) and that ask for nothing that training never shows (`shown`); and `overall`, the mean of the tasks.

    Raises:
        DataError: When a question has another number of images.
    """
    if len({len(images) for images in right}) != 1:
        raise DataError("gen6: every prompt needs the same number of images, one or more")
    found: dict[str, object] = {}
    accuracies, drawn = [], []
    for task in TASKS:
        mine = [number for number, question in enumerate(asked) if question.task == task]
        if not mine:
            raise DataError(f"gen6: no prompt of the task {task}")
        shares = torch.tensor([right[number] for number in mine], dtype=torch.float64).mean(1)
        picks = torch.randint(len(mine), (RESAMPLES, len(mine)), generator=generator(seed, "gen6", "bootstrap", task))
        accuracies.append(shares.mean().item())
        drawn.append(shares[picks].mean(1))
        scenes = [asked[number].scene for number in mine]
        found[task] = _interval(accuracies[-1], drawn[-1]) | {
            "prompts": len(mine),
            "sayable": sum(scene is not None for scene in scenes) / len(mine),
            "shown": sum(scene is not None and not scene.held_out() for scene in scenes) / len(mine),
        }
    overall = _interval(sum(accuracies) / len(TASKS), torch.stack(drawn).mean(0))
    return found | {"overall": overall, "images_per_prompt": len(right[0])}


def judge_accuracy(seed: int = 0) -> dict[str, float]:
    """How often the judge is right about rendered truth, by task.

    Each question has an image that answers it, and one that answers it wrongly in the one thing its task is about.
    """
    asked = questions(seed)
    answers = [(question, answer(question, seed, right=right)) for question in asked for right in (True, False)]
    readings = read_scenes(torch.stack([render_things(things) for _, things in answers]), MOST_THINGS)
    found: dict[str, list[bool]] = {}
    for number, ((question, _), reading) in enumerate(zip(answers, readings, strict=True)):
        found.setdefault(question.task, []).append(shows(question, reading) == (number % 2 == 0))
    return {task: sum(told) / len(told) for task, told in found.items()}


def answer(question: Question, seed: int = 0, *, right: bool = True) -> list[Placed]:
    """An image's things that answer a question, or that answer it wrongly and otherwise are as asked."""
    noise = _noise(seed, "answer", question.task, question.text)
    told = question if right else _wrongly(question, noise)
    scene, things = told.scene, told.things * told.number
    spots = _some(_QUADRANTS, told.number, noise) if scene is None else scene.centres()
    return [
        Placed(thing, x + SHIFT * _around(noise), y + SHIFT * _around(noise), 1 + STRETCH * _around(noise))
        for thing, (x, y) in zip(things, spots, strict=True)
    ]


def _wrongly(question: Question, noise: Iterator[float]) -> Question:
    first, *others = question.things
    change = dataclasses.replace
    used = {thing.shape for thing in question.things}
    match question.task:
        case "one_thing":
            return change(question, things=(change(first, shape=_other(SHAPES, used, noise)),))
        case "two_things":
            return change(question, things=(first, change(others[0], shape=_other(SHAPES, used, noise))))
        case "counting":
            return change(question, number=_other(tuple(range(1, MOST_THINGS)), {question.number}, noise))
        case "colours":
            return change(question, things=(change(first, colour=_other(COLOURS, {first.colour}, noise)),))
        case "position":
            return change(question, relation=_OPPOSITE[question.relation or ""])
        case "colour_by_thing":
            swapped = change(first, colour=others[0].colour), change(others[0], colour=first.colour)
            return change(question, things=swapped)
        case _:
            assert_never(question.task)


def _question(task: Task, noise: Iterator[float]) -> Question:
    first = Thing(_pick(SIZES, noise), _pick(COLOURS, noise), _pick(SHAPES, noise))
    match task:
        case "one_thing" | "colours":
            return Question(task, (first,), place=_pick(tuple(PLACES), noise))
        case "counting":
            return Question(task, (first,), number=_pick(tuple(NUMBERS), noise))
        case "two_things" | "position":
            colours: Sequence[str] = COLOURS
        case "colour_by_thing":
            colours = [colour for colour in COLOURS if colour != first.colour]
        case _:
            assert_never(task)
    second = Thing(_pick(SIZES, noise), _pick(colours, noise), _other(SHAPES, {first.shape}, noise))
    return Question(task, (first, second), relation=_pick(tuple(RELATIONS), noise))


def _interval(accuracy: float, resampled: torch.Tensor) -> dict[str, object]:
    edges = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {"accuracy": accuracy, "interval": edges.tolist()}


def _noise(seed: int, *names: str | int) -> Iterator[float]:
    return iter(torch.rand(32, dtype=torch.float64, generator=generator(seed, "gen6", *names)).tolist())


def _pick(options: Sequence[_T], noise: Iterator[float]) -> _T:
    return options[int(next(noise) * len(options))]


def _other(options: Sequence[_T], used: set[_T], noise: Iterator[float]) -> _T:
    return _pick([option for option in options if option not in used], noise)


def _some(options: Sequence[_T], count: int, noise: Iterator[float]) -> list[_T]:
    ranked = sorted((next(noise), number) for number in range(len(options)))
    return [options[number] for _, number in ranked[:count]]


def _around(noise: Iterator[float]) -> float:
    """In [-1, 1]."""
    return 2 * next(noise) - 1
