"""`tokscale export`: a sharded checkpoint becomes a folder that loads anywhere."""

import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from tokscale.base.config import PathKey, decode, did_you_mean
from tokscale.base.errors import CheckpointError, ConfigError, DataError
from tokscale.base.files import read_json, read_regular, require_writable
from tokscale.base.log import logger
from tokscale.base.modules import trial_build
from tokscale.checkpoint.card import model_card
from tokscale.checkpoint.commit import checkpoint_folders, step_of
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.export import CARD, export_checkpoint
from tokscale.checkpoint.reader import Checkpoint
from tokscale.checkpoint.retention import best_step
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.weights import read_export_manifest
from tokscale.data.tokens.manifest import CLASSES
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.models.common import condition_of
from tokscale.models.model import ScoringModel
from tokscale.models.registry import MODELS, ModelConfig, build_model
from tokscale.runs.stage import StageConfig, StageResult, command
from tokscale.stages.inputs import CUT
from tokscale.stages.text_states import encoder_files
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.image import load_image_tokenizer, save_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer

_log = logger("export")
_LOADERS = {"image": load_image_tokenizer, "text": load_text_tokenizer}


class ExportConfig(StageConfig):
    """Keys of the `export` stage."""

    out: PathKey | None = None
    """Where the export goes; by default `run_dir/export`."""
    step: NonNegativeInt | Literal["best"] | None = None
    """Which checkpoint: by default the newest complete one; `best`: the best of those that are kept, by the metric that
    the run was told (`best.metric`)."""
    engine: str | None = None
    """Which of the run's engines; by default `model`, or the only one."""
    dtype: Literal["fp32", "bf16", "fp16", "stored"] = "fp32"
    """Of the model's parameters; buffers keep theirs."""
    weights: str = "raw"
    """`raw`, an average such as `ema/0.999`, or `ema` when the run keeps only one."""
    max_shard_gb: float = Field(default=5.0, gt=0)
    """Size limit of one safetensors file, in 10^9 bytes; a larger model gets several and an index."""
    copy_text_encoder: bool = False
    """Put the frozen text encoder into the export, where its path and fingerprint are recorded otherwise."""
    verify: Literal["sizes", "full"] = "full"
    """What the checkpoint must pass first: sizes, or the sha256 of every file."""


CONFIG = ExportConfig


def run(config: ExportConfig, env: ProcessEnv) -> StageResult:
    """Export one engine's weights with the tokenizers; an export that is there already is recognised.

    Raises:
        CheckpointError: When there is no usable checkpoint, or it does not fit its own configuration.
        DataError: When a tokenizer is not the one the model was trained with.
        ConfigError: When `engine`, `step` or `weights` names something that was not saved.
    """
    if not env.is_main:
        return StageResult("rank 0 exports alone", skipped=True)
    out = config.out or config.run_dir / "export"
    checkpoint = _checkpoint(config, "sizes")
    existing = read_export_manifest(out) or {}
    if not existing:
        require_writable(out, "give out=FOLDER")
    engine = _engine(config, checkpoint)
    # The card names the checkpoint and how it was exported: another one is written from what is then read.
    if config.verify == "full" and not (existing and _read_card(out) == _card(config, checkpoint, engine, out)):
        checkpoint = _checkpoint(config, "full")
        engine = _engine(config, checkpoint)
    model_config = checkpoint.state["models"][engine]
    where = f"{checkpoint.folder}: models.{engine}"
    with trial_build(where, len(checkpoint.source(engine).names()), CheckpointError):
        meta_model = build_model(decode(ModelConfig, model_config, where=where, refuse=CheckpointError))
    with tempfile.TemporaryDirectory() as scratch:
        export_checkpoint(
            checkpoint,
            engine,
            meta_model=meta_model,
            model_config=model_config,
            out=out,
            dtype=config.dtype,
            weights=config.weights,
            max_shard_size=int(config.max_shard_gb * 1e9),
            extras=_beside(config, checkpoint.state, Path(scratch)),
            card=_card(config, checkpoint, engine, out),
        )
    skipped = existing == read_export_manifest(out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    what = f"{config.weights} weights of step {checkpoint.step} as {config.dtype}, {size / 1e6:.1f} MB"
    scores = issubclass(MODELS[model_config["kind"]], ScoringModel)
    what += "; give it to sample as rerank=EXPORT, or to evaluate as clip=EXPORT" if scores else ""
    return StageResult(
        f"{out} {'already holds' if skipped else 'holds'} the {what}",
        {"export": out},
        next_command=use_of(config, out, model_config),
        next_suggested=example_prompts(model_config),
        skipped=skipped,
    )


def use_of(config: StageConfig, export: Path, model: Mapping[str, Any]) -> str:
    """The command that shows what an export is good for; none for one that does nothing by itself."""
    offered = MODELS[model["kind"]].command
    if not offered.startswith("tokscale sample"):
        return offered.format(export=shlex.quote(str(export)))
    if not (export / "image_tokenizer").is_dir() or model.get("lowres"):
        return ""  # what is there draws no images without another part
    return command("sample", config, export=None if export == config.run_dir / "export" else export)


def example_prompts(model: Mapping[str, Any]) -> tuple[str, ...]:
    """What to draw first with a model of this configuration."""
    config = decode(ModelConfig, model, where="model")
    return ("prompts=0",) if condition_of(config).reads_labels else ("prompts=a small red circle",)


def _checkpoint(config: ExportConfig, verify: Literal["sizes", "full"]) -> Checkpoint:
    folder = config.run_dir / "checkpoints"
    # Alone, whatever job this process belongs to: exporting needs no process group.
    store = CheckpointStore(folder, CheckpointConfig(verify=verify), Comm(ProcessEnv()))
    step = _best(folder) if config.step == "best" else config.step
    found = store.newest() if step is None else store.at(step)
    if found is None:
        raise CheckpointError(f"{folder}: no checkpoint; train first, `tokscale train` with the same run_dir")
    return found


def _best(folder: Path) -> int:
    there = {step for path in checkpoint_folders(folder) if (step := step_of(path)) is not None}
    step = best_step(folder, there)
    if step is None:
        raise CheckpointError(
            f"step=best: {folder} has no checkpoint that was noted as the best; train with best={{metric: "
            "held_out/loss}, or give step=NUMBER, or leave it out for the newest"
        )
    return step


def _engine(config: ExportConfig, checkpoint: Checkpoint) -> str:
    # A discriminator and its like are trained beside a model, and have no use without it.
    names = [name for name in checkpoint.engines if name in checkpoint.state["models"]]
    if config.engine is not None:
        if config.engine not in names:
            aside = " (saved, but no model by itself)" if config.engine in checkpoint.engines else ""
            raise ConfigError(f"engine: got {config.engine!r}{aside}{did_you_mean(config.engine, names)}")
        return config.engine
    if "model" in names or len(names) == 1:
        return "model" if "model" in names else names[0]
    raise ConfigError(f"engine: the run has {', '.join(names)}; say which to export, e.g. engine={names[0]}")


def _beside(config: ExportConfig, state: Mapping[str, Any], scratch: Path) -> dict[str, Path]:
    """All that goes into the export beside the weights, by name."""
    extras = _tokenizers(config, state.get("tokenizers", {}), scratch)
    if facts := state.get("text_encoder"):
        extras |= encoder_files(facts, config.text_encoder, copy=config.copy_text_encoder, scratch=scratch)
    if (config.run_dir / CLASSES).exists():
        extras[CLASSES] = config.run_dir / CLASSES
    return extras


def _tokenizers(config: ExportConfig, trained_with: Mapping[str, Any], scratch: Path) -> dict[str, Path]:
    """The tokenizers' folders by their names in the export.

    Those of the configuration come before the paths the trainer saw, since a run may have been moved; either must be
    the one that made the ids. One that made those of an aspect bucket is written anew, to `scratch`, with that size.
    """
    found = {}
    for kind, facts in trained_with.items():
        path = getattr(config, f"{kind}_tokenizer") or Path(facts["path"])
        tokenizer = _LOADERS[kind](path)
        if isinstance(tokenizer, FrozenImageTokenizer) and "code_shape" in facts:
            for other in facts.get("further", ()):  # a model of several shapes: each by the same weights
                _require(kind, path, tokenizer.matching(other["fingerprint"], other["code_shape"]).fingerprint, other)
            resized = tokenizer.matching(facts["fingerprint"], facts["code_shape"])
            if resized is not tokenizer:
                tokenizer, path = resized, scratch / f"{kind}_tokenizer"
                save_image_tokenizer(resized, path)
        _require(kind, path, tokenizer.fingerprint, facts)
        found[f"{kind}_tokenizer"] = path
    return found


def _require(kind: str, path: Path, actual: str, facts: Mapping[str, Any]) -> None:
    if actual != facts["fingerprint"]:
        raise DataError(
            f"{path} is not the {kind} tokenizer this model was trained with: its fingerprint is {actual[:12]}, "
            f"the model's ids are of {facts['fingerprint'][:12]}; give {kind}_tokenizer=FOLDER"
        )


def _read_card(out: Path) -> str:
    try:
        return read_regular(out / CARD).decode(errors="replace")
    except DataError:
        return ""


def _card(config: ExportConfig, checkpoint: Checkpoint, engine: str, out: Path) -> str:
    state = checkpoint.state
    about = {
        "run": config.run_dir.name,
        "step": checkpoint.step,
        "engine": engine,
        "weights": config.weights,
        "dtype": config.dtype,
        "checkpoint": checkpoint.manifest.id,
    }
    facts = {
        "Tokenizers": {kind: value["fingerprint"] for kind, value in state.get("tokenizers", {}).items()},
        "Data": state.get("data"),
        "Captions cut": read_json(config.run_dir / CUT) if (config.run_dir / CUT).exists() else None,
        "Metrics": state.get("metrics"),
        "Recipe": state.get("config"),
    }
    values = state["models"][engine]
    model = MODELS.find(values["kind"], where=f"checkpoint, models.{engine}.kind")
    return model_card(
        folder=out.name, model_config=values, task=model.hub_task, example=model.example, about=about, facts=facts
    )
