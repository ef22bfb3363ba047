"""`tokscale compare`: several runs side by side, each number with the band that seeds alone make."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from tokscale.base.config import PathKey
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.files import atomic_write, read_json
from tokscale.dist.env import ProcessEnv
from tokscale.runs.page import Page, image, note, table
from tokscale.runs.run_folder import CONFIG_FILE, read_config
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages.report import differences, panels, with_unit
from tokscale.stages.report_evaluation import flat
from tokscale.train.metrics import read_metrics

_LEFT_OUT = ("time", "step")
_SEED = ("seed", "run_dir")
"""Last parts of keys in which runs of one configuration differ."""


class CompareConfig(StageConfig):
    """Keys of the `compare` stage."""

    runs: tuple[PathKey, ...] = Field(min_length=1)
    """Run folders: `tokscale compare runs/a runs/b`."""
    out: PathKey | None = None
    """An HTML file of the same; null for none."""
    all: bool = False
    """Every number that some run has, not only those that all have and that are not the same in all."""


CONFIG = CompareConfig


def run(config: CompareConfig, env: ProcessEnv) -> StageResult:
    """Print the last value of every metric and of every number of `report.json`, run by run.

    Runs that differ in their seed alone are one column: mean and standard deviation, the band in which a difference
    means nothing.

    Raises:
        DataError: When a folder holds no run.
        ConfigError: When there is nothing to compare with.
    """
    if len(config.runs) < 2:
        raise ConfigError(f"runs={[str(run) for run in config.runs]}: give two run folders or more")
    if not env.is_main:
        return StageResult("rank 0 compares", skipped=True)
    groups = _by_configuration(config.runs)
    groups = {f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name: runs for name, runs in groups.items()}
    numbers = {name: [_numbers(folder) for folder in folders] for name, folders in groups.items()}
    rows, same = compared(numbers, every=config.all)
    heading = ["", *groups]
    print("\n".join(_as_text([heading, *rows])))
    words = f"{same} more numbers are the same in all runs; all=true shows them" if same else ""
    if words:
        print(words)
    outputs = {}
    if config.out is not None:
        page = Page("Runs side by side", f"written {time.strftime('%Y-%m-%d %H:%M')}")
        page.add("Numbers", table(rows, heading), note(words) if words else "")
        curves, bands = _together(groups)
        several = note("A band is the mean of several seeds, and one standard deviation around it.") if bands else ""
        page.add("Curves", page.curves(curves, list(groups), bands), several)
        first = config.runs[0]
        for other in config.runs[1:]:
            found = differences(_settings(first), _settings(other))
            page.add(f"{_name(first)} and {_name(other)} differ in", table(found, ["key", _name(first), _name(other)]))
        page.add("Images", *(image(_newest_sheet(folder), _name(folder)) for folder in config.runs))
        content = page.html()
        with atomic_write(config.out, "w") as file:
            file.write(content)
        outputs = {"page": config.out}
    return StageResult(f"compared {len(config.runs)} runs in {len(rows)} numbers", outputs)


def compared(
    groups: Mapping[str, Sequence[Mapping[str, float]]], *, every: bool = False
) -> tuple[list[list[str]], int]:
    """Rows of a number's name and its value in each group of runs: mean and standard deviation of several.

    Numbers that some run has not, or that are the same in all runs, are left out unless `every` one is asked for; of
    the latter it is said how many.
    """
    names = dict.fromkeys(name for runs in groups.values() for run in runs for name in run)
    rows, same = [], 0
    for name in names:
        values = [[run[name] for run in runs if name in run] for runs in groups.values()]
        if not every and len({value for found in values for value in found}) == 1:
            same += all(values)
        elif every or all(values):
            rows.append([name, *map(_band, values)])
    return rows, same


def _band(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    words = f"{mean:,.0f}" if abs(mean) >= 1e5 else f"{mean:.4g}"
    return f"{words} \u00b1 {statistics.stdev(values):.2g}" if len(values) > 1 else words


def _by_configuration(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs whose settings are the same but for the seed and what lies in their own folders, under the first's name."""
    found: dict[str, list[Path]] = {}
    keys: dict[str, str] = {}
    for folder in runs:
        sections = _settings(folder)
        own = {str(values["run_dir"]) for values in sections.values() if "run_dir" in values}
        settings = {
            k: _in_run(v, own) for k, v in flat(sections) if k.split(".")[1:2] not in [[part] for part in _SEED]
        }
        name = keys.setdefault(repr(sorted(settings.items(), key=str)), _name(folder))
        found.setdefault(name, []).append(folder)
    return found


def _in_run(value: Any, run_dirs: set[str]) -> Any:
    """A value, or of a path in the run's own folder its place there."""
    inside = [folder for folder in run_dirs if isinstance(value, str) and value.startswith(f"{folder}/")]
    return f"run_dir{value.removeprefix(inside[0])}" if inside else value


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).exists():
        raise DataError(f"{folder}: holds no {CONFIG_FILE}; give the folder of a run")
    return read_config(folder)


def _numbers(folder: Path) -> dict[str, float]:
    """The last value of each metric, and the numbers of the evaluation."""
    found: dict[str, float] = {}
    for row in read_metrics(folder):
        found |= {k: v for k, v in row.items() if isinstance(v, int | float) and k not in _LEFT_OUT}
    report = folder / "report.json"
    if report.is_file():
        values = {k: v for k, v in read_json(report).items() if k not in ("metrics", "training", "sampling", "seed")}
        found |= {k: float(v) for k, v in flat(values) if isinstance(v, int | float) and not isinstance(v, bool)}
    return found


def _together(groups: Mapping[str, Sequence[Path]]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """One panel a metric, one line a run, or of several seeds their mean; and the bands around those."""
    found: dict[str, dict[str, Any]] = {}
    bands: dict[str, dict[str, Any]] = {}
    for group, folders in groups.items():
        runs = [
            {name: line for lines in panels(read_metrics(folder)).values() for name, line in lines.items()}
            for folder in folders
        ]
        for name in runs[0]:
            lines = [dict(zip(*run[name], strict=True)) for run in runs if name in run]
            steps = [step for step in lines[0] if all(step in line for line in lines)]
            means = [statistics.fmean(line[step] for line in lines) for step in steps]
            found.setdefault(with_unit(name), {})[group] = (steps, means)
            if len(lines) > 1:
                spread = [statistics.stdev(line[step] for line in lines) for step in steps]
                low, high = ([mean + sign * far for mean, far in zip(means, spread, strict=True)] for sign in (-1, 1))
                bands.setdefault(with_unit(name), {})[group] = (steps, low, high)
    shown = {name: lines for name, lines in found.items() if len(lines) > 1 or name in bands}
    return shown, bands


def _newest_sheet(folder: Path) -> Path:
    sheets = sorted((folder / "samples").glob("step_*.png"))
    return sheets[-1] if sheets else folder / "samples" / "beside.png"


def _name(folder: Path) -> str:
    return folder.name or str(folder)


def _as_text(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
