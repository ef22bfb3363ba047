"""`bench race`: an original and tokscale train the same model on the same pictures, in turns, and are judged alike.

    tokscale bench race run_dir=runs/quickstart data_dir=runs/quickstart/data minutes=20 figure=race.png out=race.json

Each side has one thread, its own classes, loss and loop, the same samples in the same order, the same Adam and the same
rate; both compute in fp32 unless `dtype` says otherwise of ours. They run in slices of some tens of seconds, so that
whatever else the machine does hits both. Between slices, off every clock, one judge measures the weights of both: the
original's go through the converter of `tokscale import`, so that one program computes the held-out loss and draws for
the prompts.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import PathKey, kind_of
from tokscale.base.errors import ConfigError, DataError
from tokscale.base.files import write_json
from tokscale.base.log import logger
from tokscale.base.protocols import TextTokenizer
from tokscale.base.rng import seed_of
from tokscale.bench import race_models
from tokscale.bench.comparison import Comparison, original, ours
from tokscale.bench.measure import figure, row
from tokscale.bench.race_models import FAMILIES, Sizes, told
from tokscale.data.raw.shapes import caption, evaluation_prompts, parse, render, sample_scene
from tokscale.data.raw.shapes.source import ShapesConfig
from tokscale.data.raw.shards import read_raw_manifest
from tokscale.evaluation.measures import load_eval_pairs, mean_losses
from tokscale.evaluation.shapes_judge import compare, read_scenes
from tokscale.models.registry import build_model
from tokscale.nn.strides import transpose_weights_for_decoding
from tokscale.runs.stage import StageConfig
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.original import state_dict_to_original
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer

log = logger("bench")
_SIDES = ("ours", "original")


class RaceBench(StageConfig):
    """What `bench race` is asked; `run_dir` and `data_dir` are those of a quickstart whose tokenizers are trained."""

    family: Literal["dalle", "maskgit", "parti"] = "dalle"
    """Whose original takes part. DALL-E reads images and caption ids. MaskGIT and Parti are given codes, and for the T5
    that their originals read, frozen vectors of words and places: both sides the same."""
    minutes: float = Field(default=20.0, gt=0)
    """Wall time of each side."""
    slice_seconds: float = Field(default=30.0, gt=0)
    """After so long it is the other side's turn."""
    looks: int = Field(default=8, ge=1)
    """How often, in equal parts of the time, both are measured."""
    held_out: int = Field(default=256, ge=1)
    """Images of the held-out loss, which no training split has."""
    prompts: int = Field(default=100, ge=4)
    """Drawn at each look: seen and held-out combinations, one and two things, a quarter each."""
    batch_size: int = Field(default=64, ge=1)
    """Samples of a step."""
    lr: float = Field(default=2e-3, gt=0)
    """Of Adam, as in the quickstart, but constant after the warm-up: so no curve depends on how long it was to be."""
    warmup_steps: int = Field(default=50, ge=0)
    """Of linear rise."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of Adam."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of our side's products, as `engine.dtype`: `fp32` to compare like with like, `bf16` as a run takes it where the
    CPU computes it. The original trains in fp32, as its README has it."""
    dim: int = Field(default=192, ge=1)
    """Width; this and the following are the quickstart's."""
    depth: int = Field(default=4, ge=1)
    """Layers."""
    heads: int = Field(default=6, ge=1)
    """Attention heads."""
    dim_head: int = Field(default=32, ge=1)
    """Their width."""
    text_seq_len: int = Field(default=16, ge=1)
    """Caption tokens."""
    curves: PathKey | None = None
    """JSON of what was measured at each look, written anew after each."""
    figure: PathKey | None = None
    """Where the curves are drawn, as a PNG, anew after each look; needs matplotlib."""


CONFIG = RaceBench


def rows(config: RaceBench) -> Iterator[dict[str, Any]]:
    """Race."""
    image, text = _tokenizers(config)
    family, sizes = FAMILIES[config.family], _sizes(config)
    model = family.ours(sizes, image, text)
    judge = _Judge(config, model, image, text)
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Comparison() as comparison:
        inputs = str(Path(folder) / "inputs.pt")
        torch.save(_inputs(config, image, text), inputs)
        files = {side: str(Path(folder) / f"{side}.pt") for side in _SIDES}
        loop = {name: getattr(config, name) for name in ("lr", "warmup_steps", "betas", "clip")}
        common: dict[str, Any] = {"inputs": inputs, "seconds": config.slice_seconds, "batch_size": config.batch_size}
        common["loop"] = loop
        mine = {
            "model": model.model_dump(mode="json"),
            "words": text.num_tokens,
            "dtype": config.dtype,
            "tokenizer": str(config.image_tokenizer_folder) if family.from_pixels else None,
        }
        calls = comparison.start(
            {
                "ours": ours(f"{race_models.__name__}:train", weights=files["ours"], **common, **mine),
                "original": original(
                    family.program, weights=files["original"], **common, **family.theirs(sizes, image, text)
                ),
            }
        )
        for point in _run(config, calls, lambda side: judge(side, torch.load(files[side], weights_only=True))):
            points.append(point)
            log.info("%s", _said(point))
            if config.curves is not None:
                write_json(config.curves, points)
            if config.figure is not None:
                sides = "" if config.dtype == "fp32" else f"tokscale in {config.dtype}, the original in fp32, "
                title = f"{config.family}: {sides}one thread each, in turns of {config.slice_seconds:g} s"
                draw(points, config.figure, title)
    yield from _rows(config, points)


def _run(
    config: RaceBench, calls: Mapping[str, Callable[[], Any]], measure: Callable[[str], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Slices in turn until each side has had its time; yields a point of a side at each of its looks."""
    every = config.minutes * 60 / config.looks
    spent = {side: {"seconds": 0.0, "cpu_seconds": 0.0} for side in calls}
    seen = dict.fromkeys(calls, 0)
    while due := [side for side in calls if seen[side] < config.looks]:
        for side in due:
            told, clock = calls[side](), spent[side]
            for name in clock:
                clock[name] += told[name]
            looks = min(int(clock["seconds"] / every), config.looks)
            if looks > seen[side]:
                seen[side] = looks
                yield {"side": side, **clock, "steps": told["steps"], "train_loss": told["loss"], **measure(side)}


class _Judge:
    """Measures the weights of either side by one program."""

    def __init__(self, config: RaceBench, model: Any, image: FrozenImageTokenizer, text: TextTokenizer):
        """Draw the held-out images, and choose the prompts.

        Args:
            config: How many.
            model: Configuration of the model.
            image: Makes codes of images and images of codes.
            text: Makes ids of captions.
        """
        self._config, self._image, self._seed, self._family = model, image, config.seed, FAMILIES[config.family]
        self._model: Any = build_model(model).eval()
        scenes = [sample_scene(config.seed, number, "validation") for number in range(config.held_out)]
        pixels = torch.stack([render(scene, image.image_size) for scene in scenes])
        ids, mask = text.encode([caption(scene) for scene in scenes], config.text_seq_len)
        extra = told(model, ids, text.num_tokens)
        self._held_out = TokenBatch(torch.arange(len(ids)), ids, mask, image.encode(pixels), extra=extra)
        half = config.prompts // 2
        self._prompts = [p for split in ("seen", "held_out") for p in evaluation_prompts(split, half, config.seed)]
        self._ids, self._mask = text.encode(self._prompts, config.text_seq_len)
        self._told = told(model, self._ids, text.num_tokens)

    @torch.no_grad()
    def __call__(self, side: str, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Held-out losses, and the share of prompts that were drawn exactly."""
        self._model.load_state_dict(state if side == "ours" else self._family.weights(state, self._config))
        with rng.scope(self._seed, "race", "held out"):
            losses = mean_losses(self._model, [self._held_out])
        transpose_weights_for_decoding(self._model)
        codes = self._model.generate_codes(
            self._ids,
            self._mask,
            options=self._family.sampling,
            seeds=[seed_of(self._seed, "evaluate", prompt) for prompt in self._prompts],
            extra=self._told,
        )
        readings = read_scenes(self._image.decode(codes))
        exact: dict[str, list[bool]] = {"all": []}
        for prompt, reading in zip(self._prompts, readings, strict=True):
            scene = parse(prompt)
            things, split = "two" if scene.relation else "one", "held out" if scene.held_out() else "seen"
            for group in ("all", f"{things}, {split}"):
                exact.setdefault(group, []).append(compare(scene, reading)["exact"])
        accuracy = {group: sum(found) / len(found) for group, found in exact.items()}
        return {"held_out_loss": losses, "prompt_accuracy": accuracy}


def _tokenizers(config: RaceBench) -> tuple[FrozenImageTokenizer, TextTokenizer]:
    """Of the quickstart.

    Raises:
        ConfigError: When its pictures are no shapes, or its image tokenizer none that the original has.
        DataError: When something is missing.
    """
    manifest = read_raw_manifest(config.data_dir / "raw")
    if manifest is None:
        raise DataError(
            f"{config.data_dir / 'raw'}: no images to race on; run tokscale prepare recipe=quickstart/dalle"
        )
    if manifest.source.get("kind") != kind_of(ShapesConfig()):
        raise ConfigError(f"data_dir: {config.data_dir / 'raw'} holds no shapes, and the judge reads nothing else")
    image = load_image_tokenizer(config.image_tokenizer_folder)
    if not isinstance(image.config, DiscreteVAEConfig):
        raise ConfigError(
            f"image_tokenizer: {config.image_tokenizer_folder} is a {kind_of(image.config)}; dalle-pytorch's own is a "
            "dvae, as tokscale train-tokenizer recipe=quickstart/dalle makes one"
        )
    return image, load_text_tokenizer(config.text_tokenizer_folder)


def _inputs(config: RaceBench, image: FrozenImageTokenizer, text: TextTokenizer) -> dict[str, Any]:
    """What both sides read: all that the raw shards hold."""
    captions, pixels = load_eval_pairs(config.data_dir / "raw", image.image_size)
    ids, _ = text.encode(captions, config.text_seq_len)
    own: Any = image.config
    codes = torch.cat([image.encode(part) for part in pixels.split(256)])
    vae = state_dict_to_original(image.codec.state_dict(), own)
    return {"text": ids, "pixels": pixels, "codes": codes, "vae": vae}


def _sizes(config: RaceBench) -> Sizes:
    return Sizes(config.dim, config.depth, config.heads, config.dim_head, config.text_seq_len)


def _rows(config: RaceBench, points: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    last = {point["side"]: point for point in points}
    mine, theirs = (last[side] for side in _SIDES)
    case = f"race/{config.family}/{config.minutes:g}-minutes/{config.dtype}"
    yield row(f"{case}/vs-original/steps", mine["steps"], theirs["steps"], "steps", more_is_better=True)
    each = [side["cpu_seconds"] / side["steps"] for side in (mine, theirs)]
    yield row(f"{case}/vs-original/cpu-of-a-step", each[0], each[1], "s")
    losses = [side["held_out_loss"]["total"] for side in (mine, theirs)]
    yield row(f"{case}/vs-original/held-out-loss", losses[0], losses[1], "nats", 1.0)
    for side, point in last.items():
        for group, share in point["prompt_accuracy"].items():
            yield figure(f"{case}/{side}/prompt-accuracy/{group.replace(', ', '-').replace(' ', '-')}", share, "share")
    took = time_to(points, "ours", losses[1])
    if took is not None:
        yield row(f"{case}/vs-original/time-to-its-held-out-loss", took / 60, theirs["seconds"] / 60, "minutes", 1.0)


def time_to(points: Sequence[Mapping[str, Any]], side: str, loss: float) -> float | None:
    """Seconds until a side's held-out loss fell to `loss`, on straight lines between its looks; None if it never did.

    What lies before the first look counts as the first look.
    """
    before: tuple[float, float] | None = None
    for point in points:
        if point["side"] != side:
            continue
        here = point["seconds"], point["held_out_loss"]["total"]
        if here[1] <= loss:
            if before is None:
                return here[0]
            share = (before[1] - loss) / (before[1] - here[1])
            return before[0] + share * (here[0] - before[0])
        before = here
    return None


def _said(point: Mapping[str, Any]) -> str:
    return (
        f"{point['side']}: {point['seconds'] / 60:.1f} minutes, {point['steps']} steps, held-out loss "
        f"{point['held_out_loss']['total']:.4f}, prompt accuracy {point['prompt_accuracy']['all']:.2f}"
    )


def draw(points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Held-out loss and prompt accuracy of both sides over the wall time that each has trained."""
    from matplotlib.figure import Figure

    styles = {"ours": ("tokscale", "#1b6ca8", "-"), "original": ("the original", "#c8553d", "--")}
    picture = Figure(figsize=(9, 3.6))
    left, right = picture.subplots(1, 2)
    for side, (name, colour, line) in styles.items():
        own = [point for point in points if point["side"] == side]
        minutes = [point["seconds"] / 60 for point in own]
        if not own:
            continue
        label = f"{name} ({own[-1]['steps']} steps)"
        style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3.5, "label": label}
        left.plot(minutes, [point["held_out_loss"]["total"] for point in own], **style)
        right.plot(minutes, [point["prompt_accuracy"]["all"] for point in own], **style)
    left.set(xlabel="minutes of its own wall time", ylabel="held-out loss, nats")
    right.set(xlabel="minutes of its own wall time", ylabel="prompts drawn exactly", ylim=(-0.02, 1.02))
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    picture.suptitle(title, fontsize=10)
    picture.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=130)
