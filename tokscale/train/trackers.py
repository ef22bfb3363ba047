"""Where people look at a run: TensorBoard, Weights & Biases, MLflow; the same names in each.

A run that goes on after a kill goes on there, too. Nothing of them is imported before it is asked for.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from tokscale.base.errors import EnvironmentRefused
from tokscale.base.kinds import for_each

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class Tracker(Protocol):
    """One place that a run is reported to. For the main rank."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers as they are after `step` steps, by name."""
        ...

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """A picture, such as a grid of samples."""
        ...

    def close(self) -> None:
        """Hand over what is not there yet."""
        ...


class TensorBoard(Tracker):
    """Event files in `run_dir/tensorboard`."""

    def __init__(self, run_dir: Path, first_step: int):
        """Go on at `first_step`; what an earlier process wrote about later steps is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """See `Tracker`."""
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run in the project `tokscale`, or that of `WANDB_PROJECT`, named as the run folder.

    `WANDB_MODE=offline` writes into `run_dir/wandb` alone, for `wandb sync` later.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        """Begin, or go on: a run folder is always the same run."""
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise EnvironmentRefused("loop.trackers: wandb is not installed: pip install 'tokscale[wandb]'") from None
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tokscale"),
            name=run_dir.name,
            id=_identity(run_dir),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """See `Tracker`."""
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MLflow(Tracker):
    """A run of the experiment `tokscale`, or that of `MLFLOW_EXPERIMENT_NAME`, at `MLFLOW_TRACKING_URI`.

    Without that address it is kept in `run_dir/mlruns`.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        """Begin, or go on: the run's number is kept in `run_dir/mlflow_run`."""
        try:
            from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise EnvironmentRefused("loop.trackers: mlflow is not installed: pip install 'tokscale[mlflow]'") from None
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:  # newer versions want to be told that files are meant
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run_dir / "mlruns").resolve().as_uri()
        self._client, known = MlflowClient(tracking_uri=uri), run_dir / "mlflow_run"
        if known.exists():
            self._run = known.read_text().strip()
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tokscale")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
        known.write_text(self._run)
        for key, value in _flat(config):
            self._client.log_param(self._run, key, str(value)[:500])

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """See `Tracker`."""
        self._client.log_image(self._run, image, f"{name}/{step:09d}.png")

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run)


_OPEN: Mapping[TrackerName, Callable[[Path, int, Mapping[str, Any]], Tracker]] = for_each(
    TrackerName,
    {
        "tensorboard": lambda run_dir, first_step, config: TensorBoard(run_dir, first_step),
        "wandb": lambda run_dir, first_step, config: WeightsAndBiases(run_dir, config),
        "mlflow": lambda run_dir, first_step, config: MLflow(run_dir, config),
    },
)


class Trackers(Tracker):
    """All that a run is reported to, as one."""

    def __init__(self, names: Sequence[TrackerName], run_dir: Path, first_step: int, config: Mapping[str, Any]):
        """Open them.

        Raises:
            EnvironmentRefused: When one is not installed; says how to install it.
        """
        self._all = [_OPEN[name](run_dir, first_step, config) for name in dict.fromkeys(names)]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for tracker in self._all:
            tracker.metrics(step, values)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """See `Tracker`."""
        for tracker in self._all:
            tracker.image(step, name, image)

    def close(self) -> None:
        """See `Tracker`."""
        for tracker in self._all:
            tracker.close()


def _identity(run_dir: Path) -> str:
    # A folder whose earlier starts saved nothing holds another run by now.
    earlier = sorted(path.name for path in run_dir.glob("set_aside/*-nothing-saved*"))
    return hashlib.sha256("".join([str(run_dir.resolve()), *earlier]).encode()).hexdigest()[:16]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
