"""`tokscale.Trainer`: training from Python, by the keys of `tokscale train`, with the same run folder behind it."""

from pathlib import Path
from typing import Any

from tokscale.base.config import decode
from tokscale.dist.env import detect
from tokscale.inference.loading import load
from tokscale.inference.pretrained import Pretrained
from tokscale.inference.scorer import Scorer
from tokscale.runs.outcome import Attempt
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages import export, train
from tokscale.train.metrics import read_metrics


class Trainer:
    """A run: what a model is trained on and how, to be trained, exported and opened.

    Under a launcher (`torchrun script.py`) every process makes one, as every process of `tokscale train` does.
    """

    def __init__(self, **keys: Any):
        """Take the keys of `tokscale train`; nothing is read yet.

        Args:
            keys: `model={"kind": "dalle", "dim": 256, ...}`, `data_dir="data"`, `run_dir="runs/mine"`,
                `batch_size=64`, `loop={"total_steps": 1000}` and so on, see `tokscale train --help`.

        Raises:
            ConfigError: Naming the key that is unknown or wrong.
        """
        self.config = decode(train.TrainConfig, keys)

    def __repr__(self) -> str:
        """Where the run is, on one line."""
        return f"Trainer({str(self.config.run_dir)!r}, {self.config.loop.total_steps} steps)"

    def train(self) -> list[dict[str, Any]]:
        """Train to the last step, from the newest checkpoint if there is one; the rows of `metrics.jsonl`.

        Raises:
            TokscaleError: As `tokscale train` does.
        """
        self._recorded(train, self.config)
        return read_metrics(self.config.run_dir)

    def export(self) -> Path:
        """Write the newest checkpoint's weights with both tokenizers; their folder.

        Raises:
            CheckpointError: When there is no checkpoint.
        """
        shared = {name: getattr(self.config, name) for name in StageConfig.model_fields}
        return self._recorded(export, export.ExportConfig(**shared)).outputs["export"]

    def _recorded(self, stage: Any, config: StageConfig) -> StageResult:
        """Run a stage and leave its outcome in the run folder, as a command does."""
        env = detect()
        attempt = Attempt(config.run_dir, stage.__name__.rpartition(".")[2], env)
        if env.is_main:
            attempt.begin()
        try:
            result = stage.run(config, env)
        except BaseException as error:
            attempt.fail(getattr(error, "exit_code", 1), error)
            raise
        if env.is_main:
            attempt.succeed(result)
        return result

    def load(self, **options: Any) -> Pretrained | Scorer:
        """Export, and open what was exported; see `tokscale.load`."""
        return load(self.export(), **options)
