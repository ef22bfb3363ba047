"""`tokscale report`: a run as one HTML file that opens anywhere, without a network."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tokscale.base.config import PathKey
from tokscale.base.errors import DataError
from tokscale.base.files import atomic_write, read_json
from tokscale.base.text import lines_of
from tokscale.checkpoint.retention import BEST
from tokscale.checkpoint.status import describe
from tokscale.dist.env import ProcessEnv
from tokscale.runs.goodput import goodput
from tokscale.runs.outcome import read_outcomes
from tokscale.runs.page import Page, image, slider, table, text
from tokscale.runs.restarts import read_starts
from tokscale.runs.run_folder import CONFIG_FILE, read_config
from tokscale.runs.segments import describe as describe_segment
from tokscale.runs.segments import read_segments
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages.report_evaluation import add_evaluation, flat
from tokscale.stages.status import lines
from tokscale.stages.train_samples import FOLDER, LISTING
from tokscale.train.metrics import read_metrics

_MOST_POINTS = 2000
_MOST_SHEETS = 40
_PANELS = {
    "loss": ("loss", "held_out/loss"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "images per second": ("images_per_second",),
    "seconds per step": (
        "seconds_per_step",
        "held_out/seconds",
        "samples/seconds",
        "reconstruction/seconds",
        "attention_entropy/seconds",
    ),
    "MFU, waiting, goodput": ("mfu", "data_wait", "device_idle", "goodput"),
    "memory, GB": ("memory_rss", "memory_cuda"),
    "reconstruction, dB": ("reconstruction/psnr",),
    "reconstruction, SSIM": ("reconstruction/ssim",),
    "reconstruction, KID": ("reconstruction/rkid",),
    "dropped steps": ("nonfinite_steps",),
}
_FAMILIES = {
    "parts of the loss": ("loss/", "held_out/loss/"),
    "gradient norm by layer": ("grad_norm/",),
    "entropy of attention, nats": ("attention_entropy/",),
}
"""Panels of all names that begin alike."""
_SCALES = {"memory_rss": 1e-9, "memory_cuda": 1e-9}
_ELSEWHERE = {"step", "time", "tokens_per_second", "straggler_rank", "straggler_score"}


class ReportConfig(StageConfig):
    """Keys of the `report` stage."""

    out: PathKey | None = None
    """The file; by default `run_dir/report.html`."""
    other: PathKey | None = None
    """A run folder with whose configuration this one's is compared."""


CONFIG = ReportConfig


def run(config: ReportConfig, env: ProcessEnv) -> StageResult:
    """Write what `run_dir` has recorded; what is not recorded is left out.

    Raises:
        DataError: When there is no such folder, or nothing of a run in it.
        EnvironmentRefused: When plotly is not installed.
    """
    out = config.out or config.run_dir / "report.html"
    if not env.is_main:
        return StageResult("rank 0 writes the report", skipped=True)
    folders = [config.run_dir, *sorted(path.parent for path in config.run_dir.glob("*/config.yaml"))]
    if not any((folder / CONFIG_FILE).exists() for folder in folders):
        raise DataError(f"{config.run_dir}: holds no run; give run_dir=FOLDER of a stage that has trained")
    page = Page(str(config.run_dir.name), f"written {time.strftime('%Y-%m-%d %H:%M')} from {config.run_dir.resolve()}")
    page.add("Where it stands", *(text("\n".join(lines(folder)), whole=True) for folder in folders))
    for folder in folders:
        name = "" if folder == config.run_dir else f"{folder.name}: "
        page.add(f"{name}Curves by step", page.curves(panels(read_metrics(folder))))
        page.add(f"{name}Images while it trained", slider(list(_sheets(folder))))
        page.add(f"{name}Where the time went", _time_spent(folder))
        if folder == config.run_dir:
            add_evaluation(page, folder)
    _add_configuration(page, config)
    page.add("Environment", _environment(config.run_dir))
    page.add("Checkpoints", *(_checkpoints(folder) for folder in folders))
    page.add("Incidents", *(_incidents(folder) for folder in folders))
    _add_data(page, config)
    content = page.html()
    with atomic_write(out, "w") as file:
        file.write(content)
    return StageResult(f"{out} ({len(content) / 1e6:.1f} MB)", {"report": out})


def panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """What to draw of the lines of `metrics.jsonl`, by panel and name; long runs are thinned."""
    named = {name for row in rows for name in row} - _ELSEWHERE
    wanted = {title: [name for name in names if name in named] for title, names in _PANELS.items()}
    shown = {name for names in wanted.values() for name in names}
    for title, begins in _FAMILIES.items():
        wanted[title] = sorted((name for name in named - shown if name.startswith(begins)), key=_by_number)
        shown |= set(wanted[title])
    for name in sorted(named - shown):
        wanted.setdefault(name.removeprefix("held_out/"), []).append(name)
    wanted = {title: sorted(names, key=lambda name: name.startswith("held_out/")) for title, names in wanted.items()}
    found = {}
    for title, names in wanted.items():
        drawn = {name: points for name in names if (points := _points(rows, name))[0]}
        if not any(any(values) for _, values in drawn.values()):
            continue  # of what counts incidents, that there were none
        if drawn:
            found[title] = drawn
    return found


def with_unit(name: str) -> str:
    """The name of a metric, with the unit in which it is drawn where that is not its own."""
    return f"{name}, GB" if name in _SCALES else name


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 9 before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def _points(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    scale = _SCALES.get(name, 1)
    pairs = [(row["step"], scale * row[name]) for row in rows if isinstance(row.get(name), int | float)]
    every = -(-len(pairs) // _MOST_POINTS) or 1
    kept = [pair for number, pair in enumerate(pairs) if number % every == 0 or number == len(pairs) - 1]
    return [step for step, _ in kept], [value for _, value in kept]


def _sheets(folder: Path) -> Iterator[tuple[Path, str]]:
    """The sheets that training left, spread over the run where there are many."""
    path = folder / FOLDER / LISTING
    rows = []
    for line in lines_of(path.read_text(errors="replace")) if path.is_file() else []:
        try:
            row = json.loads(line)
            rows.append((path.parent / Path(str(row["file"])).name, f"step {row['step']}"))
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # torn by a kill
    every = -(-len(rows) // _MOST_SHEETS) or 1
    yield from (row for number, row in enumerate(rows) if (len(rows) - 1 - number) % every == 0)


def _time_spent(folder: Path) -> str:
    """Useful steps, and what took the rest since the first submission."""
    found = goodput(folder)
    if found is None:
        return ""
    parts = {"steps that count (goodput)": found.useful, **found.lost}
    rows = [
        [name, round(seconds, 1), round(100 * seconds / max(found.wall, 1e-9), 1)] for name, seconds in parts.items()
    ]
    return table(rows, ["", "seconds", "%"])


def _add_configuration(page: Page, config: ReportConfig) -> None:
    mine = read_config(config.run_dir)
    command = config.run_dir / "command.txt"
    parts = [text(yaml.safe_dump(mine, sort_keys=False, allow_unicode=True), CONFIG_FILE)] if mine else []
    parts += [text(command.read_text(errors="replace"), "commands")] if command.is_file() else []
    page.add("Configuration", *parts)
    if config.other is not None:
        if not (config.other / CONFIG_FILE).exists():
            raise DataError(f"other={config.other}: holds no {CONFIG_FILE}; give the folder of a run")
        rows = differences(mine, read_config(config.other))
        heading = ["key", config.run_dir.name, config.other.name]
        page.add(f"Difference to {config.other.name}", table(rows, heading) or text("none"))


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[list[Any]]:
    """Keys whose values are not the same, with both."""
    here, there = dict(flat(mine)), dict(flat(other))
    keys = dict.fromkeys((*here, *there))
    return [
        [key, *(_typed(values[key]) if key in values else "" for values in (here, there))]
        for key in keys
        if here.get(key) != there.get(key)
    ]


def _typed(value: Any) -> str:
    """A value as one types it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _environment(folder: Path) -> str:
    path = folder / "env.json"
    return table([list(pair) for pair in flat(read_json(path))]) if path.is_file() else ""


def _checkpoints(folder: Path) -> str:
    root = folder / "checkpoints"
    if not root.is_dir():
        return ""
    best = read_json(root / BEST)["best"][-1]["step"] if (root / BEST).is_file() else None
    rows = [
        [info.step, info.bytes, info.world, info.complete, "best" if info.step == best else info.problem]
        for info in describe(root)
    ]
    return table(rows, ["step", "bytes", "ranks", "complete", ""])


def _incidents(folder: Path) -> str:
    rows: list[list[Any]] = []
    for start in read_starts(folder)[1:]:
        why = f" after {start['after']}" if start.get("after") else ""
        rows.append([_when(start.get("time")), "started again", f"at step {start.get('step')}{why}"])
    for outcome in read_outcomes(folder):
        if outcome.get("code") not in (None, 0):
            rows.append(
                [
                    _when(outcome.get("time")),
                    f"{outcome.get('stage')} ended with {outcome['code']}",
                    outcome.get("message"),
                ]
            )
        elif outcome.get("state") == "killed":
            rows.append([_when(outcome.get("time")), f"{outcome.get('stage')} was killed", outcome.get("node")])
    rows += [[_when(segment.get("time")), "changed", describe_segment(segment)] for segment in read_segments(folder)]
    dropped = 0.0
    for row in read_metrics(folder):
        now = row.get("nonfinite_steps") or 0.0
        if now > dropped:
            rows.append([_when(row.get("time")), "steps dropped", f"{now - dropped:.0f} up to step {row['step']}"])
        dropped = now
    return table(sorted(rows, key=lambda row: str(row[0])), ["when", "what", ""])


def _when(seconds: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if isinstance(seconds, int | float) else ""


def _add_data(page: Page, config: ReportConfig) -> None:
    raw = config.data_dir / "raw"
    found = [list(pair) for pair in flat(_json(config.data_dir / "tokens" / "stats.json"))]
    rows = [row for row in found if not isinstance(row[1], str) or len(row[1]) < 200]
    cut = [list(pair) for pair in flat(_json(config.run_dir / "captions.json"))]
    page.add("Data", image(raw / "preview.png", "from the data set"), table(rows[:60]), table(cut))


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
