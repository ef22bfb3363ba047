"""A GPU's numbers for `bench plan`, out of a report of `bench gpu`, in the place of the vendor's."""

import json
import re
from pathlib import Path
from typing import Any, TypeVar

from tokscale.base.errors import DataError
from tokscale.base.log import logger
from tokscale.base.text import lines_of
from tokscale.bench.plan_time import TimeConfig

Plan = TypeVar("Plan", bound=TimeConfig)
log = logger("bench")
_MATMUL = re.compile(r"gpu/machine/matmul-(\d+)/(\w+)(/vs-peak)?/throughput")
_FIGURES = {
    "gpu/machine/memory": "gpu_bytes",
    "gpu/machine/device-to-device/throughput": "memory_bandwidth",
    "gpu/machine/host-to-device/throughput": "host_bandwidth",
}
"""Rows in GB or GB/s, and the keys that they stand for."""
_LARGE = 4096
"""Products at least so large say what a GPU can do; those of `sizes=tiny` do not."""
_ARITHMETIC = {"bf16": ("bf16",), "fp32": ("tf32", "fp32")}


def with_machine(config: Plan, report: Path, dtype: str) -> Plan:
    """A plan with what a GPU was measured to do; keys that the plan itself gives stay.

    Links between GPUs are not in the report, which is of one GPU.

    Args:
        config: The plan.
        report: Folder that `bench gpu` wrote.
        dtype: `fp32` or `bf16`, the plan's; of fp32, products in TF32 count where they are allowed.

    Raises:
        DataError: When the folder is no such report, or holds no speed of products.
    """
    found = _measured(report, dtype)
    taken = {key: value for key, value in found.items() if key in type(config).model_fields}
    taken = {key: value for key, value in taken.items() if key not in config.model_fields_set}
    log.info("of %s: %s", report, ", ".join(f"{key}={value:.4g}" for key, value in taken.items()) or "nothing is taken")
    return config.model_copy(update=taken)


def _measured(report: Path, dtype: str) -> dict[str, float]:
    path = report / "rows.jsonl"
    if not path.is_file():
        raise DataError(f"gpu_report={report}: holds no rows.jsonl; make one by `tokscale bench gpu report={report}`")
    rows = [row for line in lines_of(path.read_text(errors="replace")) if (row := _row(line)) is not None]
    found = {_FIGURES[row["name"]]: row["ours"] * 1e9 for row in rows if row["name"] in _FIGURES}
    products = {match[2]: (row, int(match[1])) for row in rows if (match := _MATMUL.fullmatch(row["name"]))}
    chosen = next((products[name] for name in _ARITHMETIC[dtype] if name in products), None)
    if chosen is None:
        raise DataError(
            f"{path}: holds no speed of products in {' or '.join(_ARITHMETIC[dtype])}; run `tokscale bench gpu "
            f"sections=[machine] report={report}` on the GPU"
        )
    row, size = chosen
    if size < _LARGE:
        log.warning("%s: products of %d x %d say little about a GPU; run bench gpu with sizes=full", path, size, size)
    peak = row["baseline"] or row["ours"]  # of a device in no table, its own speed
    return found | {"peak_flops": peak * 1e12, "efficiency": min(row["ours"] / peak, 1.0)}


def _row(line: str) -> dict[str, Any] | None:
    """A row with a value; None for one that was skipped, failed or torn."""
    try:
        row = json.loads(line)
        return {"name": str(row["name"]), "ours": float(row["ours"]), "baseline": row.get("baseline")}
    except (ValueError, KeyError, TypeError):
        return None
