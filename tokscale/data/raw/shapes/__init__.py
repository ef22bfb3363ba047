"""The built-in data set: one or two coloured shapes and a sentence; `evaluation.shapes_judge` reads images back."""

from tokscale.data.raw.shapes.grammar import Scene, Thing, caption, evaluation_prompts, parse, sample_scene
from tokscale.data.raw.shapes.render import Placed, render, render_things

__all__ = [
    "Placed",
    "Scene",
    "Thing",
    "caption",
    "evaluation_prompts",
    "parse",
    "render",
    "render_things",
    "sample_scene",
]
