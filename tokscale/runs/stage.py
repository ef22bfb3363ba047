"""What every stage shares: its paths, and how a stage reports."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from tokscale.base.config import Config, PathKey


class StageConfig(Config):
    """The keys of a recipe's `shared` section; every stage has them beside its own."""

    run_dir: PathKey = Path("runs/default")
    """The run folder: configuration, logs, metrics, checkpoints, samples."""
    data_dir: PathKey = Path("data")
    """Holds `raw/` (image+caption shards) and `tokens/` (token shards)."""
    image_tokenizer: PathKey | None = None
    """Export folder of the image tokenizer; by default `run_dir/image_tokenizer`, where `train-tokenizer` puts it."""
    text_tokenizer: PathKey | None = None
    """Folder of the text tokenizer; by default `run_dir/text_tokenizer`, likewise."""
    text_encoder: PathKey | None = None
    """Folder of a frozen text encoder (T5, CLIP, ...) in the layout of the transformers library, for models that are
    conditioned on its states (`condition.kind=embeddings`)."""
    text_encoder_precision: Literal["fp32", "bf16"] = "bf16"
    """Of the text encoder's weights and arithmetic; part of its fingerprint. T5 overflows fp16."""
    text_encoder_length: int = Field(default=256, ge=1)
    """Where captions are cut for the text encoder, in its own tokens; part of its fingerprint."""
    allow_torchscript: bool = False
    """Load TorchScript programs: image tokenizers of `kind: torchscript`, feature extractors (`features=`). They are
    programs: say true for those whose author you trust."""
    seed: int = 0
    """Base of every random stream of the run."""

    @property
    def image_tokenizer_folder(self) -> Path:
        """`image_tokenizer`, or its default."""
        return self.image_tokenizer or self.run_dir / "image_tokenizer"

    @property
    def text_tokenizer_folder(self) -> Path:
        """`text_tokenizer`, or its default."""
        return self.text_tokenizer or self.run_dir / "text_tokenizer"


def command(stage: str, config: StageConfig, **keys: object) -> str:
    """`tokscale <stage> key=value ...`, quoted for a shell.

    Args:
        stage: Which stage.
        config: Its shared keys are given, where they are not the defaults.
        keys: Further ones, a dot written as two underscores; None leaves one out.
    """
    shared = {
        name: value
        for name in StageConfig.model_fields
        if (value := getattr(config, name)) != StageConfig.model_fields[name].default
    }
    given = shared | {name.replace("__", "."): value for name, value in keys.items() if value is not None}
    return shlex.join(["tokscale", stage, *(f"{name}={value}" for name, value in given.items())])


@dataclass(frozen=True)
class StageResult:
    """How a stage ended well. Failures are exceptions of `base.errors`."""

    summary: str
    """One line for a person: what was made, where, and the metric that matters most."""
    outputs: dict[str, Path] = field(default_factory=dict)
    """Named artefacts."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Measured numbers by name, e.g. `images_per_second`; kept in `run_dir/stages/<stage>.json` for the report."""
    next_command: str = ""
    """The command that continues the pipeline, quoted for a shell; see `command`."""
    next_suggested: tuple[str, ...] = ()
    """Words that it takes unless a recipe speaks for their keys: whoever has chosen no model is shown one that fits."""
    next_keeps: bool = False
    """Whether it takes all words of the command that has just ended, but those it gives itself."""
    skipped: bool = False
    """True when everything was already there."""
    stdout_taken: bool = False
    """True when what the stage printed is for a program to read: the closing lines then go elsewhere."""
