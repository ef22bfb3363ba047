import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokscale.base.batch import ImageBatch, TokenBatch
from tokscale.train.metrics import METRICS_FILE, Meter, MetricsWriter, memory, read_metrics


def tokens(batch: int = 4) -> TokenBatch:
    return TokenBatch(
        positions=torch.arange(batch),
        text=torch.ones(batch, 6, dtype=torch.int64),
        text_mask=torch.ones(batch, 6, dtype=torch.bool),
        codes=torch.ones(batch, 5, 2, dtype=torch.int64),
    )


def write(folder, first_step, *rows):
    writer = MetricsWriter(folder, first_step)
    for step, metrics in rows:
        writer.write(step, metrics)
    writer.close()


def test_a_line_a_step_in_strict_json(tmp_path):
    write(tmp_path, 0, (1, {"loss": 2.5, "mfu": None, "grad_norm": math.nan}), (2, {"loss": math.inf}))
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    first, second = (json.loads(line, parse_constant=lambda word: 1 / 0) for line in lines)
    assert first["step"] == 1 and first["loss"] == 2.5 and first["mfu"] is None and first["grad_norm"] is None
    assert second["loss"] is None
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_tensorboard_gets_the_same_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, (1, {"loss": 2.5, "mfu": None}), (2, {"loss": 1.5}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert events.Tags()["scalars"] == ["loss"]


def test_steps_that_did_not_survive_a_kill_are_dropped(tmp_path):
    write(tmp_path, 0, *((step, {"loss": float(step)}) for step in range(1, 6)))
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 6, "lo')  # torn in the middle of a write
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, 3, (4, {"loss": 40.0}))
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_torn_line_alone_is_repaired_too(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n{"st')
    write(tmp_path, 1, (2, {"loss": 2.0}))
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_rates_count_all_ranks(monkeypatch):
    clock = iter([10.0, 12.0, 12.0, 13.0, 13.0])
    # Not of the module itself, which other threads of this process ask as well.
    monkeypatch.setattr("tokscale.train.metrics.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = Meter(world=3, flops_per_sample=2e9, peak_flops=1e11)
    meter.count(tokens(4), waited=0.5)
    meter.count(tokens(4), waited=0.5)
    metrics = meter.read()
    assert metrics["images_per_second"] == 8 * 3 / 2
    assert metrics["tokens_per_second"] == 8 * 16 * 3 / 2
    assert metrics["seconds_per_step"] == 1.0 and metrics["data_wait"] == 0.5
    assert metrics["mfu"] == 12 * 2e9 / 3e11
    # Each reading starts afresh.
    meter.count(tokens(4), waited=0.0)
    assert meter.read()["images_per_second"] == 4 * 3 / 1


def test_what_is_unknown_is_none():
    meter = Meter(world=1, flops_per_sample=2e9, peak_flops=None)
    meter.count(ImageBatch(positions=torch.arange(2), pixels=torch.zeros(2, 3, 4, 4, dtype=torch.uint8)), waited=0.0)
    metrics = meter.read()
    assert metrics["mfu"] is None and metrics["tokens_per_second"] is None and metrics["images_per_second"] > 0


def test_memory_is_the_peak_of_this_process():
    before = memory(torch.device("cpu"))["memory_rss"]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    more = int(before) - pages * os.sysconf("SC_PAGE_SIZE") + 64_000_000  # enough to rise above any earlier peak
    block = torch.ones(more, dtype=torch.uint8)
    del block
    assert before + 32e6 < memory(torch.device("cpu"))["memory_rss"] < before + 96e6


@pytest.mark.parametrize("line", ["[1]", "5", "{}", '{"step": "x"}', "[" * 9000, "\udcff{", '{"step": 1'])
def test_lines_that_are_no_rows_are_left_out_and_taken_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line.encode(errors="surrogateescape") + b"\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    write(tmp_path, 1, (2, {"loss": 1.0}))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2] and len(path.read_text().splitlines()) == 2
