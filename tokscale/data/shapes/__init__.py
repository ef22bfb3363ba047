"""The built-in data set: one or two coloured shapes and a sentence, with a judge that reads pictures back."""

from tokscale.data.shapes.grammar import Scene, Thing, caption, evaluation_prompts, parse, sample_scene
from tokscale.data.shapes.judge import Reading, SeenThing, judge, score
from tokscale.data.shapes.render import render

__all__ = [
    "Reading",
    "Scene",
    "SeenThing",
    "Thing",
    "caption",
    "evaluation_prompts",
    "judge",
    "parse",
    "render",
    "sample_scene",
    "score",
]
