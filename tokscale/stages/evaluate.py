"""`tokscale evaluate`: how good an export is, in one `report.json` beside what every stage measured of itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from tokscale.base.config import PathKey, fingerprint
from tokscale.base.errors import CheckpointError, ConfigError, DataError
from tokscale.base.files import read_json, read_regular, require_writable, sha256_file, write_json
from tokscale.base.formats import upgrade
from tokscale.base.log import logger
from tokscale.base.protocols import ImageTokenizer
from tokscale.base.rng import seed_of
from tokscale.base.shapes import Tensor, UInt8
from tokscale.base.text import lines_of
from tokscale.data.raw.shapes import caption, evaluation_prompts, render, sample_scene
from tokscale.dist.device import choose_device, choose_dtype
from tokscale.dist.env import ProcessEnv
from tokscale.evaluation.measures import clip_metrics, load_eval_pairs, mean_losses
from tokscale.evaluation.quality import quality, reconstructed
from tokscale.evaluation.shapes_judge import read_scenes, score
from tokscale.inference.grids import interleave, save_grid
from tokscale.inference.pretrained import Pretrained, load_pretrained
from tokscale.inference.scorer import load_scorer
from tokscale.models.common import condition_of
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages.sample import sample_batches

log = logger("evaluate")


class EvaluateConfig(StageConfig):
    """Keys of the `evaluate` stage."""

    export: PathKey | None = None
    """Export folder to measure; by default `run_dir/export`."""
    out: PathKey | None = None
    """The report; by default `run_dir/report.json`."""
    judge: bool = True
    """Measure prompt accuracy and reconstruction with the judge of the `shapes` data set; false for other data."""
    prompts: int = Field(default=500, ge=0)
    """Sampled images, half of seen and half of held-out combinations, one and two things in turn."""
    images: int = Field(default=512, ge=1)
    """Held-out images for reconstruction and loss."""
    features: PathKey | None = None
    """A TorchScript feature extractor, such as `inception-2015-12-05.pt`, for rFID; null for none.
    It is a program: `allow_torchscript=true` says that you trust it."""
    batch_size: int = Field(default=250, ge=1)
    """Images sampled together."""
    held_out: PathKey | None = None
    """Raw shards that training did not see: the model's loss on them, and its loss without their captions."""
    clip: PathKey | None = None
    """Export folder of a CLIP that judges images drawn for the captions of `drawn`: its score, and how often it finds
    an image's caption among others."""
    drawn: tuple[PathKey, ...] = ()
    """Raw shards whose captions are drawn for `clip`, each a set of its own; by default those of `held_out`."""
    pool: int = Field(default=100, ge=2)
    """Captions of each set of `drawn`, spread over it, among which an image's own is to be found."""
    top: int = Field(default=10, ge=1)
    """Found means: among so many best."""
    split_lines: bool = False
    """Every line of a caption file is a caption of its own, as in training with `text.split_lines`."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA when there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model's weights: `auto` is bf16 on a GPU that computes it, and elsewhere as they are stored."""
    sampling: dict[str, Any] = {}
    """Options of the model's own sampling configuration."""


CONFIG = EvaluateConfig


def run(config: EvaluateConfig, env: ProcessEnv) -> StageResult:
    """Measure, and write the report; a report of the same export and the same questions is left alone."""
    del env
    export = config.export or config.run_dir / "export"
    out = config.out or config.run_dir / "report.json"
    if not (export / "manifest.json").exists():
        raise CheckpointError(f"{export}: no export; give export=FOLDER that `tokscale export` wrote")
    request = fingerprint({"weights": sha256_file(export / "manifest.json"), "config": config.model_dump(mode="json")})
    if out.exists() and read_json(out).get("request") == request:
        return StageResult(f"{out} already answers this", {"report": out}, skipped=True)
    require_writable(out, "give out=FILE")
    device = choose_device(config.device)
    pretrained = load_pretrained(
        export, device=device, dtype=choose_dtype(config.dtype, device), text_encoder=config.text_encoder
    )
    report: dict[str, Any] = {"request": request, "export": str(export), "sampling": config.sampling}
    if config.judge:
        captions, images = _held_out_images(config, pretrained)
        report |= _prompt_accuracy(config, pretrained, out.parent / "samples")
        report |= _reconstruction(config, pretrained.image_tokenizer, captions, images, out.parent / "samples")
        report["held_out_losses"] = mean_losses(
            pretrained.model, pretrained.batches(captions, images, config.batch_size)
        )
    if config.held_out is not None:
        captions, images = load_eval_pairs(
            config.held_out,
            pretrained.image_tokenizer.image_size,
            split_lines=config.split_lines,
            classes=condition_of(pretrained.config).reads_labels,
        )
        report["held_out_losses"] = mean_losses(
            pretrained.model, pretrained.batches(captions, images, config.batch_size)
        )
        report["held_out_losses_without_captions"] = mean_losses(
            pretrained.model, pretrained.batches(captions, images, config.batch_size, keep_condition=False)
        )
    if config.clip is not None:
        report["clip"] = _clip(config, pretrained, out.parent / "samples")
    for words in pretrained.cut_captions():
        log.warning("%s", words)
    report |= _of_the_stages(config.run_dir)
    write_json(out, report)
    return StageResult(f"{_headline(report)}; all metrics in {out}", {"report": out}, metrics=_flat(report))


def _held_out_images(
    config: EvaluateConfig, pretrained: Pretrained
) -> tuple[list[str], UInt8[Tensor, "batch channels height width"]]:
    """Images of seen combinations that no training split holds."""
    scenes = [sample_scene(config.seed, index, "validation") for index in range(config.images)]
    size = pretrained.image_tokenizer.image_size
    return [caption(scene) for scene in scenes], torch.stack([render(scene, size) for scene in scenes])


def _prompt_accuracy(config: EvaluateConfig, pretrained: Pretrained, folder: Path) -> dict[str, Any]:
    prompts = [p for split in ("seen", "held_out") for p in evaluation_prompts(split, config.prompts // 2, config.seed)]
    if not prompts:
        return {}
    seeds = [seed_of(config.seed, "evaluate", prompt) for prompt in prompts]
    images = sample_batches(pretrained, prompts, seeds, config.batch_size, config.sampling)
    shown = torch.linspace(0, len(prompts) - 1, min(36, len(prompts))).round().int().tolist()
    save_grid(images[shown], [prompts[i] for i in shown], folder / "evaluation.png", columns=6)
    return {"prompt_accuracy": score(prompts, read_scenes(images))}


def _clip(config: EvaluateConfig, pretrained: Pretrained, folder: Path) -> dict[str, Any]:
    """By the name of each set: how well drawn images, and the set's own, fit the captions."""
    assert config.clip is not None
    scorer, found = load_scorer(config.clip, device=choose_device(config.device)), {}
    sets = config.drawn or ((config.held_out,) if config.held_out is not None else ())
    if not sets:
        raise ConfigError("clip judges images drawn for captions: say whose, drawn=[FOLDER] or held_out=FOLDER")
    for raw in sets:
        captions, images = load_eval_pairs(
            raw, pretrained.image_tokenizer.image_size, at_most=config.pool, split_lines=config.split_lines
        )
        seeds = [seed_of(config.seed, "evaluate", caption) for caption in captions]
        made = sample_batches(pretrained, captions, seeds, config.batch_size, config.sampling)
        shown = torch.linspace(0, len(captions) - 1, min(36, len(captions))).round().int().tolist()
        save_grid(made[shown], [captions[i] for i in shown], folder / f"drawn-{raw.name}.png", columns=6)
        words = scorer.encode_captions(captions)
        found[raw.name] = {
            name: clip_metrics(words, scorer.encode_images(shown), config.top)
            for name, shown in (("drawn", made), ("real", images))
        }
    return found


def _reconstruction(
    config: EvaluateConfig,
    tokenizer: ImageTokenizer,
    captions: list[str],
    images: UInt8[Tensor, "batch channels height width"],
    folder: Path,
) -> dict[str, Any]:
    _, rebuilt = reconstructed(tokenizer, images)
    accuracy = score(captions, read_scenes(rebuilt))
    labels = [text for pair in zip(captions[:16], ["rebuilt"] * 16, strict=False) for text in pair]
    save_grid(interleave(images[:16], rebuilt[:16]), labels, folder / "reconstructions.png", columns=8)
    two = accuracy["two_objects"]
    assert isinstance(two, Mapping) and isinstance(accuracy["seen"], Mapping)
    return {
        "reconstruction_accuracy": accuracy["seen"]["exact"],
        "reconstruction_accuracy_two_objects": two["seen"]["exact"],
        **{f"reconstruction_{name}": value for name, value in quality(images, rebuilt, config.features).items()},
    }


def _of_the_stages(run_dir: Path) -> dict[str, Any]:
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


def _headline(report: Mapping[str, Any]) -> str:
    accuracy = report.get("prompt_accuracy")
    if not accuracy:
        found = [
            f"CLIP finds {100 * drawn['found']:.0f}% of {name}'s captions, {drawn['times_chance']:.1f} times chance"
            for name, drawn in ((name, entry["drawn"]) for name, entry in report.get("clip", {}).items())
        ]
        return "; ".join(found) or "measured"
    seen, held_out = (accuracy.get(split, {}).get("exact", float("nan")) for split in ("seen", "held_out"))
    return (
        f"prompt accuracy (one thing, exact) {seen:.2f} seen, {held_out:.2f} held out; "
        f"reconstruction {report['reconstruction_accuracy']:.2f}"
    )


def _flat(report: Mapping[str, Any]) -> dict[str, float]:
    numbers = ("reconstruction_accuracy", "reconstruction_accuracy_two_objects", "reconstruction_psnr")
    return {name: report[name] for name in numbers if name in report}
