"""What a report of `evaluate` says of the run beside what it measured, and its line for a person."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokscale.base.errors import DataError
from tokscale.base.files import read_json, read_regular
from tokscale.base.formats import upgrade
from tokscale.base.text import lines_of


def of_the_stages(run_dir: Path) -> dict[str, Any]:
    """What the stages below a run folder recorded: seconds each, their metrics, and the last training losses."""
    records = {path.stem: upgrade("stage", read_json(path)) for path in sorted(run_dir.rglob("stages/*.json"))}
    metrics = {name: record["metrics"] for name, record in records.items() if record["metrics"] and name != "evaluate"}
    headlines = {
        "tokenization_images_per_second": metrics.get("tokenize", {}).get("images_per_second"),
        "training_tokens_per_second": metrics.get("train", {}).get("tokens_per_second"),
        "peak_memory_bytes": max((record.get("memory_rss", 0) for record in metrics.values()), default=0) or None,
    }
    report = {name: value for name, value in headlines.items() if value is not None}
    report |= {"seconds": {name: record["seconds"] for name, record in records.items()}, "metrics": metrics}
    steps = run_dir / "metrics.jsonl"
    return report | ({"training": _last_line(steps)} if steps.exists() else {})


def _last_line(path: Path) -> dict[str, Any]:
    lines = lines_of(read_regular(path).decode(errors="replace"))
    try:
        return json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        raise DataError(f"{path}: its last line is not JSON; the training stage writes it again when re-run") from None


def headline(report: Mapping[str, Any]) -> str:
    """The most telling numbers."""
    found = []
    if accuracy := report.get("prompt_accuracy"):
        seen, held_out = (accuracy.get(split, {}).get("exact", float("nan")) for split in ("seen", "held_out"))
        found.append(
            f"prompt accuracy (one thing, exact) {seen:.2f} seen, {held_out:.2f} held out; "
            f"reconstruction {report['reconstruction_accuracy']:.2f}"
        )
    if six := report.get("gen6"):
        low, high = six["overall"]["interval"]
        found.append(f"gen6 {six['overall']['accuracy']:.2f} [{low:.2f}, {high:.2f}]")
    for name, entry in report.get("clip", {}).items():
        drawn = entry["drawn"]
        found.append(
            f"CLIP finds {100 * drawn['found']:.0f}% of {name}'s captions, {drawn['times_chance']:.1f} times chance"
        )
    for name, row in report.get("images", {}).items():
        if "kid" in row:
            found.append(f"{name} KID x 1000 {1e3 * row['kid']:.1f} \u00b1 {1e3 * row['kid_error']:.1f}")
    return "; ".join(found) or "measured"


def flat(report: Mapping[str, Any]) -> dict[str, float]:
    """Those that the stage's own record holds."""
    numbers = ("reconstruction_accuracy", "reconstruction_accuracy_two_objects", "reconstruction_psnr")
    return {name: report[name] for name in numbers if name in report}
