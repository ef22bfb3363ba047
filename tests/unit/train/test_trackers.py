"""TensorBoard, W&B and MLflow: the same names and values in each, and one run however often it is begun."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tokscale.base.errors import EnvironmentRefused
from tokscale.train.metrics import MetricsWriter

PICTURE = Image.new("RGB", (6, 4), (250, 0, 0))
ROWS = {10: {"loss": 2.5, "lr": 1e-3, "mfu": None}, 20: {"loss": 1.5, "lr": 5e-4, "mfu": float("nan")}}


def report(folder: Path, name: str) -> None:
    """Two processes, one after the other, that report two steps and a picture."""
    for first, step in ((0, 10), (10, 20)):
        writer = MetricsWriter(folder, first, [name], {"optim": {"lr": 1e-3}})
        writer.write(step, ROWS[step])
        writer.trackers.image(step, "samples", PICTURE)
        writer.close()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 2.5), (20, 1.5)]
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]
    assert [event.step for event in events.Images("samples")] == [10, 20]


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format behind seven bytes of its own."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield parts
            parts = b""


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb: not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    report(tmp_path, "wandb")
    wandb.teardown()  # its service writes behind the back of whoever has finished
    rows, runs = [], set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.project, record.run.run_id, record.run.display_name))
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    assert len(runs) == 1 and next(iter(runs))[0] == "tokscale" and next(iter(runs))[2] == tmp_path.name
    found = {row["_step"]: row for row in rows}
    assert {step: (row["loss"], row["lr"]) for step, row in found.items()} == {10: (2.5, 1e-3), 20: (1.5, 5e-4)}
    assert all("mfu" not in row and row["samples/width"] == 6 for row in found.values())


def test_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow: not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    report(tmp_path, "mlflow")
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tokscale")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 and runs[0].info.run_name == tmp_path.name and runs[0].data.params == {"optim.lr": "0.001"}
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 2.5), (20, 1.5)]
    assert "mfu" not in runs[0].data.metrics
    assert len(client.list_artifacts(runs[0].info.run_id, "samples")) == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_is_not_installed_is_said_with_the_way_out(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(EnvironmentRefused, match=rf"{name} is not installed: pip install 'tokscale\[{name}\]'"):
        MetricsWriter(tmp_path, 0, [name])
