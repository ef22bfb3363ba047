"""`tokscale evaluate`: how good an export is, in one `report.json` beside what every stage measured of itself."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from tokscale.base.config import PathKey, decode, encode, fingerprint, kind_of
from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.files import read_json, require_writable, sha256_file, write_json
from tokscale.base.log import logger
from tokscale.base.protocols import ImageTokenizer
from tokscale.base.rng import seed_of
from tokscale.base.shapes import Tensor, UInt8
from tokscale.data.raw.shapes import caption, evaluation_prompts, render, sample_scene
from tokscale.data.raw.shapes.source import ShapesConfig
from tokscale.data.raw.shards import read_raw_manifest
from tokscale.dist.comm import Comm
from tokscale.dist.device import choose_device, choose_dtype
from tokscale.dist.env import ProcessEnv
from tokscale.evaluation import gen6
from tokscale.evaluation.features import NAMED, open_network, see
from tokscale.evaluation.measures import NoneOfThatShapeError, clip_metrics, load_eval_pairs, mean_losses
from tokscale.evaluation.quality import frechet_distance, psnr, reconstructed, ssim
from tokscale.evaluation.shapes_judge import read_scenes, score
from tokscale.inference.foreign_clip import load_clip
from tokscale.inference.grids import interleave, save_grid
from tokscale.inference.pretrained import Pretrained, load_pretrained
from tokscale.models.common import condition_of
from tokscale.runs.parts import Parts
from tokscale.runs.stage import StageConfig, StageResult
from tokscale.stages.evaluate_images import ImagesQuestion, evaluate_images
from tokscale.stages.evaluate_report import flat, headline, of_the_stages
from tokscale.stages.sample import sample_batches
from tokscale.tokenizers.vqgan.perceptual import PerceptualConfig

log = logger("evaluate")


class EvaluateConfig(StageConfig):
    """Keys of the `evaluate` stage."""

    export: PathKey | None = None
    """Export folder to measure; by default `run_dir/export`."""
    out: PathKey | None = None
    """The report; by default `run_dir/report.json`."""
    judge: bool | Literal["auto"] = "auto"
    """Measure prompt accuracy and reconstruction with the judge of the `shapes` data set. `auto`: unless
    `data_dir/raw` or `reference` says that the data are others."""
    reference: PathKey | None = None
    """Raw shards of real images that training did not see: as many are drawn for their captions (or classes), and the
    drawn are compared with them, beside what the tokenizer alone makes of the real ones."""
    count: int = Field(default=1000, ge=40)
    """Real images of `reference`, and prompts. Fewer are refused; twice as many in the reference also say how far
    real images are from real ones."""
    per_prompt: int = Field(default=1, ge=1)
    """Images drawn for each prompt of `reference`; two or more also measure the variety within a prompt."""
    classifier: str | None = None
    """A network by name or path, whose likeliest class should be the one that was asked for: class accuracy. Needs a
    `reference` with classes."""
    lpips: PerceptualConfig | None = None
    """Files of the perceptual loss's weights, for the LPIPS of reconstructions."""
    prompts: int = Field(default=500, ge=0)
    """Sampled images, half of seen and half of held-out combinations, one and two things in turn."""
    gen6: int = Field(default=0, ge=0)
    """Images of each of the 553 prompts of `gen6`, six questions about shapes in the manner of GenEval, which draws 4;
    0 asks none."""
    images: int = Field(default=512, ge=1)
    """Held-out images for reconstruction and loss."""
    features: str | None = None
    """The network that looks at images: `efficientnet_lite0`, whose weights a package ships (extra `evaluate`), or the
    path of a TorchScript program, such as `inception-2015-12-05.pt`. With `reference` the first by default; without
    it, null measures no rFID. A program runs what its author wrote: `allow_torchscript=true` says that you trust it."""
    batch_size: int = Field(default=250, ge=1)
    """Images sampled together."""
    held_out: PathKey | None = None
    """Raw shards that training did not see: the model's loss on them, and its loss without their captions."""
    clip: PathKey | None = None
    """Export folder of a CLIP, or the folder of one of the transformers library, that judges images drawn for the
    captions of `drawn`: its score, and how often it finds an image's caption among others."""
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
    """Measure, and write the report; a report of the same export and the same questions is left alone.

    What is measured, and each batch that is drawn, is kept until then: a start that is ended early costs no more.
    """
    export = config.export or config.run_dir / "export"
    out = config.out or config.run_dir / "report.json"
    if not (export / "manifest.json").exists():
        raise CheckpointError(f"{export}: no export; give export=FOLDER that `tokscale export` wrote")
    request = fingerprint({"weights": sha256_file(export / "manifest.json"), "config": config.model_dump(mode="json")})
    if out.exists() and read_json(out).get("request") == request:
        return StageResult(f"{out} already answers this", {"report": out}, skipped=True)
    require_writable(out, "give out=FILE")
    judged = _judged(config)
    device = choose_device(config.device, env.local_rank)
    comm = Comm(env, device)
    pretrained = load_pretrained(
        export, device=device, dtype=choose_dtype(config.dtype, device), text_encoder=config.text_encoder
    )
    report: dict[str, Any] = {
        "request": request,
        "export": str(export),
        "export_sha256": sha256_file(export / "manifest.json"),
        "sampling": encode(decode(pretrained.model.sampling_config, config.sampling, where="sampling")),
        "seed": config.seed,
    }
    one = len(pretrained.tokenizers) == 1
    found = {size: _Measured(config, pretrained if one else pretrained.of_size(size)) for size in pretrained.tokenizers}
    for size, measured in found.items():
        place = out if one else out.parent / size / out.name
        measured.images(request=request, folder=place.parent, device=device, comm=comm)
        if comm.is_main:
            parts = Parts(place.with_name(f".{out.name}.parts"), request)
            measured.alone(judged, parts, place.parent / "samples")
    if not comm.is_main:
        comm.close()
        return StageResult("rank 0 measures", skipped=True)
    reports = {size: measured.report for size, measured in found.items()}
    report |= next(iter(reports.values())) if one else {"sizes": reports}
    for words in pretrained.cut_captions():
        log.warning("%s", words)
    report |= of_the_stages(config.run_dir)
    write_json(out, report)
    for measured in found.values():
        measured.clear()
    comm.close()
    lines = [headline(each) if one else f"{size}: {headline(each)}" for size, each in reports.items()]
    return StageResult(f"{'; '.join(lines)}; all metrics in {out}", {"report": out}, metrics=flat(report))


class _Measured:
    """What is measured of one size of images."""

    def __init__(self, config: EvaluateConfig, pretrained: Pretrained):
        self._config, self._pretrained = config, pretrained
        self._parts: Parts | None = None
        self.report: dict[str, Any] = {}

    def images(self, *, request: str, folder: Path, device: torch.device, comm: Comm) -> None:
        """Drawn images against those of the reference. Collective."""
        if self._config.reference is None:
            return
        asked = {"request": request, "folder": folder, "device": device, "comm": comm}
        with self._noting("reference"):
            question = _question(self._config, self._pretrained)
            self.report["images"] = evaluate_images(self._pretrained, question, **asked)

    def alone(self, judged: bool, parts: Parts, samples: Path) -> None:
        """Everything else, by the main rank."""
        config, pretrained, self._parts = self._config, self._pretrained, parts
        height, width = pretrained.image_tokenizer.image_hw
        if judged and height == width:  # scenes are drawn in squares
            captions, images = _held_out_images(config, pretrained)
            self.report |= parts.values("prompts", lambda: _prompt_accuracy(config, pretrained, samples, parts))
            if config.gen6:
                self.report["gen6"] = parts.values("gen6", lambda: _gen6(config, pretrained, samples, parts))
            self.report |= parts.values(
                "reconstruction",
                lambda: _reconstruction(config, pretrained.image_tokenizer, captions, images, samples),
            )
            self.report["held_out_losses"] = parts.values(
                "losses", lambda: _losses(config, pretrained, captions, images)
            )
        if config.held_out is not None:
            held_out = config.held_out
            with self._noting("held_out"):
                self.report |= parts.values("held_out", lambda: _held_out_losses(config, held_out, pretrained))
        if config.clip is not None:
            with self._noting("clip"):
                self.report["clip"] = parts.values("clip", lambda: _clip(config, pretrained, samples, parts))

    def clear(self) -> None:
        """Remove what was kept until the report was there."""
        if self._parts is not None:
            self._parts.clear()

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """Note what a set has no images for, of a model of several sizes; the others are measured all the same."""
        try:
            yield
        except NoneOfThatShapeError as error:
            log.warning("%s: %s; left out", what, error)
            self.report.setdefault("left_out", {})[what] = str(error)


def _held_out_losses(config: EvaluateConfig, folder: Path, pretrained: Pretrained) -> dict[str, Any]:
    captions, images = load_eval_pairs(
        folder,
        pretrained.shape,
        split_lines=config.split_lines,
        classes=condition_of(pretrained.config).reads_labels,
    )

    def losses(*, keep_condition: bool) -> dict[str, float]:
        batches = pretrained.batches(captions, images, config.batch_size, keep_condition=keep_condition)
        return mean_losses(pretrained.model, batches)

    return {
        "held_out_losses": losses(keep_condition=True),
        "held_out_losses_without_captions": losses(keep_condition=False),
    }


def _judged(config: EvaluateConfig) -> bool:
    """Whether the judge of shapes has a say.

    Raises:
        ConfigError: When it is asked about other data, or nothing is asked at all.
    """
    judged = config.judge is not False and _may_be_shapes(config)
    _refuse_unread(config, judged)
    if config.gen6 and not judged:
        raise ConfigError("gen6: its judge reads only shapes, and the data are others, or judge=false; leave it out")
    if not (judged or config.held_out or config.clip or config.reference):
        raise ConfigError(
            "nothing to measure: there are no shapes to judge; give reference=FOLDER of real images, held_out=FOLDER, "
            "or clip=EXPORT"
        )
    return judged


def _refuse_unread(config: EvaluateConfig, judged: bool) -> None:
    """Refuse what was asked for and would be read by nobody; what a recipe may say in advance is told in a line."""
    if config.reference is None:
        asked = {
            "classifier": config.classifier is not None,
            "lpips": config.lpips is not None,
            "per_prompt": config.per_prompt > 1,
            "features": config.features is not None and not judged,
        }
        for key in (key for key, is_asked in asked.items() if is_asked):
            raise ConfigError(f"{key} is about images of a reference: give reference=FOLDER, or leave the key out")
    if config.drawn and config.clip is None:
        log.warning("drawn: its captions are drawn for a CLIP alone, and there is none; give clip=EXPORT")


def _may_be_shapes(config: EvaluateConfig) -> bool:
    folders = (config.reference, config.data_dir / "raw")
    for folder in (folder for folder in folders if folder is not None and folder.is_dir()):
        manifest = read_raw_manifest(folder)
        kind = None if manifest is None else manifest.source.get("kind")  # None in tars of others
        if config.judge is True and kind not in (None, kind_of(ShapesConfig())):
            raise ConfigError(
                f"judge=true: {folder} holds {kind!r}, and the judge reads only shapes; leave the key out, and compare "
                "with real images: reference=FOLDER"
            )
        if config.judge is not True and kind != kind_of(ShapesConfig()):
            return False
    return True


def _question(config: EvaluateConfig, pretrained: Pretrained) -> ImagesQuestion:
    assert config.reference is not None
    return ImagesQuestion(
        reference=config.reference,
        count=config.count,
        per_prompt=config.per_prompt,
        network=config.features or NAMED[0],
        classifier=config.classifier,
        lpips=config.lpips,
        classes=condition_of(pretrained.config).reads_labels,
        split_lines=config.split_lines,
        batch_size=config.batch_size,
        seed=config.seed,
        sampling=config.sampling,
    )


def _held_out_images(
    config: EvaluateConfig, pretrained: Pretrained
) -> tuple[list[str], UInt8[Tensor, "batch channels height width"]]:
    """Images of seen combinations that no training split holds."""
    scenes = [sample_scene(config.seed, index, "validation") for index in range(config.images)]
    size = pretrained.image_tokenizer.image_size
    return [caption(scene) for scene in scenes], torch.stack([render(scene, size) for scene in scenes])


def _losses(
    config: EvaluateConfig,
    pretrained: Pretrained,
    captions: list[str],
    images: UInt8[Tensor, "batch channels height width"],
) -> dict[str, float]:
    return mean_losses(pretrained.model, pretrained.batches(captions, images, config.batch_size))


def _draw(
    config: EvaluateConfig, pretrained: Pretrained, captions: list[str], name: str, parts: Parts, each: int = 1
) -> UInt8[Tensor, "batch channels height width"]:
    """`each` images in a row for each caption, the batches that an earlier start drew included."""
    drawn = []
    prompts = [caption for caption in captions for _ in range(each)]
    # The first of each has the stream that it has alone.
    streams = [(caption, number) if number else (caption,) for caption in captions for number in range(each)]
    seeds = [seed_of(config.seed, "evaluate", *stream) for stream in streams]
    for number, at in enumerate(range(0, len(prompts), config.batch_size)):
        part = slice(at, at + config.batch_size)
        draw = partial(sample_batches, pretrained, prompts[part], seeds[part], config.batch_size, config.sampling)
        drawn.append(parts.tensor(f"{name}_{number:05d}", draw))
    return torch.cat(drawn)


def _prompt_accuracy(config: EvaluateConfig, pretrained: Pretrained, folder: Path, parts: Parts) -> dict[str, Any]:
    prompts = [p for split in ("seen", "held_out") for p in evaluation_prompts(split, config.prompts // 2, config.seed)]
    if not prompts:
        return {}
    images = _draw(config, pretrained, prompts, "drawn", parts)
    shown = torch.linspace(0, len(prompts) - 1, min(36, len(prompts))).round().int().tolist()
    save_grid(images[shown], [prompts[i] for i in shown], folder / "evaluation.png", columns=6)
    return {"prompt_accuracy": score(prompts, read_scenes(images))}


def _gen6(config: EvaluateConfig, pretrained: Pretrained, folder: Path, parts: Parts) -> dict[str, Any]:
    asked = gen6.questions(config.seed)
    images = _draw(config, pretrained, [question.text for question in asked], "gen6", parts, config.gen6)
    readings = iter(read_scenes(images, gen6.MOST_THINGS))
    right = [[gen6.shows(question, next(readings)) for _ in range(config.gen6)] for question in asked]
    shown = [number for numbers in _by_task(asked).values() for number in numbers[:6]]
    labels = [f"{asked[n].text} ({'right' if right[n][0] else 'not right'})" for n in shown]
    save_grid(images[:: config.gen6][shown], labels, folder / "gen6.png", columns=6)
    return gen6.score(asked, right, config.seed) | {"judge_accuracy": gen6.judge_accuracy(config.seed)}


def _by_task(asked: list[gen6.Question]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, question in enumerate(asked):
        found.setdefault(question.task, []).append(number)
    return found


def _clip(config: EvaluateConfig, pretrained: Pretrained, folder: Path, parts: Parts) -> dict[str, Any]:
    """By the name of each set: how well drawn images, and the set's own, fit the captions."""
    assert config.clip is not None
    scorer, found = load_clip(config.clip, device=choose_device(config.device)), {}
    sets = config.drawn or ((config.held_out,) if config.held_out is not None else ())
    if not sets:
        raise ConfigError("clip judges images drawn for captions: say whose, drawn=[FOLDER] or held_out=FOLDER")
    for number, raw in enumerate(sets):
        captions, images = load_eval_pairs(raw, pretrained.shape, at_most=config.pool, split_lines=config.split_lines)
        made = _draw(config, pretrained, captions, f"set{number}", parts)
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
        **{f"reconstruction_{name}": value for name, value in _kept_of(images, rebuilt, config.features).items()},
    }


def _kept_of(images: Tensor, rebuilt: Tensor, features: str | None) -> dict[str, float]:
    found = {"psnr": psnr(images, rebuilt), "ssim": ssim(images, rebuilt)}
    if features is not None:
        network = open_network(features)
        found["rfid"] = frechet_distance(see(network, images).features, see(network, rebuilt).features)
    return found
