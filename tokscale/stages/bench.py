"""`tokscale bench <what>`: speed and memory beside a baseline, as a table and, with `out=`, as JSON.

Each `what` is a module of `tokscale/bench/` that offers `CONFIG`, a class of its keys, and `rows(config)`, which yields
rows made by `bench.measure`. A ratio above 1 means that tokscale is the better one, for time and memory alike.
"""

import ast
import importlib
import pkgutil
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import create_model

from tokscale import bench as benches
from tokscale.base.config import Config, PathKey, did_you_mean, encode
from tokscale.base.errors import ConfigError
from tokscale.base.files import write_json
from tokscale.base.log import logger
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.runs.environment import environment
from tokscale.runs.stage import StageConfig, StageResult

log = logger("bench")


class BenchConfig(StageConfig):
    """Keys of the `bench` stage; those of what is measured come beside them: `tokscale bench <what> --help`."""

    what: str = ""
    """What is measured: the name of a module of `tokscale/bench/`."""
    out: PathKey | None = None
    """JSON file of the report, written anew after each row: `{"env": ..., "rows": [...]}`."""


CONFIG = BenchConfig


class BenchModule(Protocol):
    """What a module of `tokscale/bench/` offers."""

    CONFIG: type[Config]
    rows: Callable[[Any], Iterable[dict[str, Any]]]


def whats() -> dict[str, str]:
    """What can be measured, with the first line of its description. Nothing is imported."""
    found: dict[str, str] = {}
    for module in pkgutil.iter_modules(benches.__path__):
        if module.ispkg:
            continue
        tree = ast.parse((Path(benches.__path__[0]) / f"{module.name}.py").read_text())
        names = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        if any(isinstance(name, ast.Name) and name.id == "CONFIG" for name in names):  # the others are tools
            found[module.name] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def config_for(what: str) -> type[BenchConfig]:
    """The stage's keys and those of one bench.

    Raises:
        ConfigError: When there is no such bench.
    """
    known = whats()
    if what not in known:
        given = f"unknown bench {what!r}" if what else "say what to measure: tokscale bench <what> key=value ..."
        raise ConfigError(f"{given}{did_you_mean(what, known)}")
    made: Any = create_model(f"Bench_{what}", __base__=(BenchConfig, _load(what).CONFIG))
    return made


def run(config: BenchConfig, env: ProcessEnv) -> StageResult:
    """Measure, say each row as it is there, and print the table.

    Raises:
        EnvironmentRefused: When a baseline or a tool is missing.
    """
    if not env.is_main:
        return StageResult("measured by the first rank")
    told: dict[str, Any] = {
        "env": environment(Comm(ProcessEnv()))
        # A report is for others, whom the folders of this machine tell nothing.
        | {"executable": Path(sys.executable).name}
        | {"command": shlex.join(["tokscale", *sys.argv[1:]]), "config": encode(config)},
        "rows": [],
    }
    module = _load(config.what)
    # Of the bench's own class, which other processes know by its name, too.
    own = module.CONFIG(**{name: getattr(config, name) for name in module.CONFIG.model_fields})
    for entry in module.rows(own):
        if kind := next((word for word in ("skipped", "failed") if word in entry), None):
            told.setdefault(kind, []).append(entry)
            log.info("%s: %s: %s", entry["name"], kind, entry[kind])
        else:
            told["rows"].append(entry)
            log.info(" ".join(_cells(entry)))
        if config.out is not None:
            write_json(config.out, told)
    rows = told["rows"]
    _show(config.what, rows)
    missed = [row["name"] for row in rows if not _met(row)]
    goals = sum(row["target"] is not None for row in rows)
    words = f"{len(rows)} rows, {goals - len(missed)} of {goals} targets met"
    words += "".join(f", {len(told[kind])} {kind}" for kind in ("skipped", "failed") if kind in told)
    words += "".join(f"\n  missed: {name}" for name in missed)
    return StageResult(
        words + "".join(f"\n  failed: {entry['name']}: {entry['failed']}" for entry in told.get("failed", ())),
        outputs={"report": config.out} if config.out is not None else {},
    )


def _load(what: str) -> BenchModule:
    return cast(BenchModule, importlib.import_module(f"{benches.__name__}.{what}"))


def _met(row: dict[str, Any]) -> bool:
    return row["target"] is None or row["ratio"] >= row["target"]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as a person reads it."""
    target = "" if row["target"] is None else f"target {row['target']:.3g} {'met' if _met(row) else 'MISSED'}"
    ours, baseline = ("" if row[side] is None else f"{row[side]:.4g}" for side in ("ours", "baseline"))
    return row["name"], ours, baseline, row["unit"], "" if row["ratio"] is None else f"{row['ratio']:.3g}x", target


def _show(what: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table: drawn on a terminal, plain columns in a log."""
    titles = ("bench", "ours", "baseline", "unit", "ratio", "")
    lines = [_cells(row) for row in rows]
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:  # rich comes with the `train` extra
            pass
        else:
            table = Table(*titles, title=f"bench {what}: a ratio above 1 means that tokscale is better")
            for line in lines:
                table.add_row(*line, style="red" if "MISSED" in line[-1] else None)
            Console().print(table)
            return
    widths = [max(len(line[at]) for line in [titles, *lines]) for at in range(len(titles))]
    for line in [titles, *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
