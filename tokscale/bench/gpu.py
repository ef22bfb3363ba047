"""`bench gpu`: whether everything is right and fast on a GPU, in ten minutes, as a report folder.

    tokscale bench gpu device=cuda report=gpu_h200          # on a GPU
    tokscale bench gpu device=cpu sizes=tiny report=tiny    # the same list anywhere, in a minute

Sections follow one another in a process beside this one: speed of the machine, attention by every backend beside
dense, first losses of every recipe and engine beside stored ones, `bench train`, `bench decode`, image tokenizers,
saving beside training, the tests marked `gpu`, the quickstart, a trace. Each row is in the report as soon as it is
measured. A section that fails or takes longer than its time leaves the rows it had and a row that says so; the others
run all the same.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokscale.base.config import Config, PathKey, did_you_mean
from tokscale.base.errors import ConfigError
from tokscale.base.files import atomic_write, storage_errors
from tokscale.bench.acceptance.process import SectionProcess
from tokscale.bench.acceptance.sections import SECTIONS
from tokscale.bench.measure import failed
from tokscale.dist.comm import Comm
from tokscale.dist.device import choose_device
from tokscale.dist.env import ProcessEnv
from tokscale.runs.environment import environment

SECONDS = 600.0
"""Of a whole run with full sizes."""


class GpuBench(Config):
    """What `bench gpu` runs."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where: `cuda`, `cpu`, or `auto`."""
    sizes: Literal["full", "tiny"] = "full"
    """`tiny`: the same list with models of a few thousand weights, to try the list itself."""
    report: PathKey = Path("gpu_report")
    """Folder of the report: `rows.jsonl` and `README.md`, and what sections add."""
    sections: tuple[str, ...] = tuple(SECTIONS)
    """Which, in their order."""
    seconds: float = Field(default=SECONDS, gt=0)
    """For all of them; a section's share follows."""


CONFIG = GpuBench


def rows(config: GpuBench) -> Iterator[dict[str, Any]]:
    """Run the sections, and yield their rows as they come.

    Raises:
        ConfigError: For a section of unknown name.
    """
    for name in config.sections:
        if name not in SECTIONS:
            raise ConfigError(f"sections: unknown section {name!r}{did_you_mean(name, SECTIONS)}")
    device = choose_device(config.device)
    with tempfile.TemporaryDirectory() as scratch:
        report = _Report(config, str(device))
        folders = {"folder": str(config.report.resolve()), "scratch": scratch}
        process = SectionProcess({"device": str(device), "sizes": config.sizes, **folders}, report.log)
        left = config.seconds
        try:
            for number, name in enumerate(config.sections):
                share = config.seconds * SECTIONS[name].seconds / sum(SECTIONS[n].seconds for n in SECTIONS)
                later = sum(SECTIONS[other].seconds for other in config.sections[number + 1 :])
                later *= config.seconds / sum(section.seconds for section in SECTIONS.values())
                began = time.monotonic()
                for entry in _section(process, name, max(share, left - later)):
                    report.add(entry)
                    yield entry
                taken = time.monotonic() - began
                report.took(name, taken)
                left -= taken
        finally:
            process.close()


def _section(process: SectionProcess, name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A section's rows; its failure is the last of them."""
    try:
        yield from process.rows(name, seconds)
    except (RuntimeError, TimeoutError, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        yield failed(f"gpu/{name}", said[-1][:500])


class _Report:
    """The folder that a run fills."""

    def __init__(self, config: GpuBench, device: str):
        self._folder, self._device = config.report, device
        self._rows: list[dict[str, Any]] = []
        self._took: dict[str, float] = {}
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in ("rows.jsonl", "log.txt"):
                (self._folder / name).write_text("")
        self._env = environment(Comm(ProcessEnv()))
        self._command = f"tokscale bench gpu device={config.device} sizes={config.sizes}"
        self._write()

    @property
    def log(self) -> Path:
        """What the sections say."""
        return self._folder / "log.txt"

    def add(self, entry: dict[str, Any]) -> None:
        """Write a row, at once and for good."""
        self._rows.append(entry)
        with storage_errors(self._folder), open(self._folder / "rows.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._write()

    def took(self, section: str, seconds: float) -> None:
        """A section is done."""
        self._took[section] = seconds
        self._write()

    def _write(self) -> None:
        with atomic_write(self._folder / "README.md", "w") as file:
            file.write(self._text())

    def _text(self) -> str:
        lines = [
            f"# `bench gpu` on {self._device}",
            "",
            f"`{self._command}`, commit {self._env.get('commit', 'unknown')}. A ratio above 1 means better than what "
            "stands beside it, or within what is allowed.",
            "",
            "| section | rows | failed | seconds |",
            "|---|---|---|---|",
        ]
        for name in dict.fromkeys(entry["name"].split("/")[1] for entry in self._rows):
            mine = [entry for entry in self._rows if entry["name"].split("/")[1] == name]
            bad = sum("failed" in entry for entry in mine)
            lines.append(f"| {name} | {len(mine)} | {bad} | {self._took.get(name, float('nan')):.0f} |")
        lines += ["", "| row | ours | beside | unit | ratio | target |", "|---|---|---|---|---|---|"]
        lines += [_line(entry) for entry in self._rows]
        lines += ["", "```json", json.dumps(self._env, indent=1, default=str), "```", ""]
        return "\n".join(lines)


def _line(entry: dict[str, Any]) -> str:
    for kind in ("failed", "skipped"):
        if kind in entry:
            return f"| {entry['name']} | {kind}: {entry[kind]} | | | | |".replace("\n", " ")
    cells = ["" if entry[key] is None else f"{entry[key]:.4g}" for key in ("ours", "baseline", "ratio")]
    target = ""
    if entry["target"] is not None:
        target = f"{entry['target']:.3g} {'met' if entry['ratio'] >= entry['target'] else '**missed**'}"
    return f"| {entry['name']} | {cells[0]} | {cells[1]} | {entry['unit']} | {cells[2]} | {target} |"
