"""What `tokscale evaluate` measured, as sections of a page: tables with their units, and how to read them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokscale.base.files import read_json
from tokscale.runs.page import Page, image, note, table

_SETS = {"drawn": "drawn", "reconstructed": "rebuilt by the tokenizer alone", "real": "other real images"}
_NUMBERS = {
    "count": ("images", 1),
    "kid": ("KID x 1000", 1000),
    "kid_error": ("\u00b1", 1000),
    "fd": ("FD", 1),
    "fd_extrapolated": ("FD at infinity", 1),
    "precision": ("precision", 1),
    "recall": ("recall", 1),
    "density": ("density", 1),
    "coverage": ("coverage", 1),
    "inception_score": ("IS", 1),
    "psnr": ("PSNR, dB", 1),
    "ssim": ("SSIM", 1),
    "lpips": ("LPIPS", 1),
}
"""Their headings, and what they are multiplied by."""
_SHARES = {"exact": "all right", "shape": "shape", "colour": "colour", "size": "size", "position": "position"}
_SHARES |= {"relation": "relation", "count": "images"}
_READING = (
    "KID and FD are distances from the real images: smaller is nearer, and a KID within twice its \u00b1 (one standard "
    "error) of 0 is no difference. Precision and density say how many of the images look like real ones, recall and "
    "coverage how much of what real ones show is there; the row of other real images says what is perfect. What the "
    "tokenizer alone loses no model gets back."
)
_NO_LEVEL = "FD of fewer than 5,000 images says little as a level: compare it at equal counts only."
_SIX = (
    "Share of images that show what was asked, with its interval of 95 % (prompts drawn again and again). Share of the "
    "prompts whose words captions of the data set can say, and whose combinations training shows. Share that the judge "
    "reads rightly of images that were rendered."
)
_SHAPES = "Share of images in which a judge reads what the prompt says, in whole and in its parts."


def add_evaluation(page: Page, folder: Path) -> None:
    """Sections about `report.json` of a run folder, for each size of images; none where there is none."""
    path = folder / "report.json"
    if not path.is_file():
        return
    report = read_json(path)
    sizes = report.get("sizes")
    for size, part in sizes.items() if isinstance(sizes, Mapping) else [("", report)]:
        _add_size(page, part, folder / size / "samples", f" of {size}" if size else "")
    page.add("Seconds of each stage", table(list(report.get("seconds", {}).items()), ["stage", "seconds"]))


def _add_size(page: Page, report: Mapping[str, Any], samples: Path, of: str) -> None:
    images = report.get("images", {})
    page.add(
        f"Images against real ones{of}",
        *_against_real(images),
        table(_shares_of(images.get("class_accuracy", {})), ["class accuracy of", "share"]),
        table(list(images.get("diversity", {}).items()), ["mean cosine distance of pairs", ""]),
        image(samples / "beside.png", "real, rebuilt by the tokenizer alone, drawn"),
        table([[name, str(value)] for name, value in images.get("about", {}).items()], ["how it was measured", ""]),
    )
    if tasks := _gen6(report.get("gen6", {})):
        heading = ["task", "right", "from", "to", "captions can say", "training shows", "judge is right"]
        page.add(
            f"gen6: six questions about shapes{of}",
            table(tasks, heading),
            note(_SIX),
            image(samples / "gen6.png", "the first prompts of each task"),
        )
    if prompts := _prompts(report.get("prompt_accuracy", {})):
        page.add(
            f"Prompt accuracy{of}",
            table(prompts, ["prompts", *_SHARES.values()]),
            note(_SHAPES),
            image(samples / "evaluation.png", "drawn for the prompts of the evaluation"),
        )
    shown = ("images", "gen6", "prompt_accuracy", "metrics", "seconds", "training", "request", "sizes")
    rest = [[name, value] for name, value in flat({k: v for k, v in report.items() if k not in shown})]
    page.add(
        f"Other measures{of}",
        table(rest),
        image(samples / "reconstructions.png", "images beside their reconstructions"),
    )


def _against_real(images: Mapping[str, Any]) -> list[str]:
    rows = {words: images[name] for name, words in _SETS.items() if "kid" in images.get(name, {})}
    if not rows:
        return []
    numbers = [name for name in _NUMBERS if any(name in row for row in rows.values())]
    cells = [[words, *(_scaled(row.get(name), _NUMBERS[name][1]) for name in numbers)] for words, row in rows.items()]
    found = [table(cells, ["", *(_NUMBERS[name][0] for name in numbers)]), note(_READING)]
    levels = all(row.get("fd_is_a_level", True) for row in rows.values())
    return found if levels else [*found, note(_NO_LEVEL)]


def _scaled(value: Any, by: int) -> Any:
    return round(value * by, 2) if by != 1 and isinstance(value, int | float) else value


def _shares_of(found: Mapping[str, Any]) -> list[list[Any]]:
    return [[words, found[name]] for name, words in _SETS.items() if name in found]


def _gen6(asked: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each task, that of all tasks last."""
    judge = asked.get("judge_accuracy", {})
    tasks = {name: row for name, row in asked.items() if isinstance(row, Mapping) and "interval" in row}
    return [
        [name, row["accuracy"], *row["interval"], row.get("sayable"), row.get("shown"), judge.get(name)]
        for name, row in sorted(tasks.items(), key=lambda task: task[0] == "overall")
    ]


def _prompts(found: Mapping[str, Any]) -> list[list[Any]]:
    two = found.get("two_objects", {})
    rows = {
        "one thing, seen in training": found.get("seen"),
        "one thing, held out": found.get("held_out"),
        "two things, seen in training": two.get("seen"),
        "two things, held out": two.get("held_out"),
    }
    return [[words, *(row.get(name) for name in _SHARES)] for words, row in rows.items() if row]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values under dotted keys; lists as JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str | None) else json.dumps(value)
