"""`tokscale sample`: prompts to images, a labelled grid and a JSON list of what was drawn with what."""

import re
import time
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field, PositiveInt, model_validator

from tokscale.base.config import PathKey, fingerprint
from tokscale.base.errors import DataError
from tokscale.base.files import read_json, read_regular, require_writable, sha256_file, write_json
from tokscale.base.log import logger
from tokscale.base.progress import progress
from tokscale.base.rng import seed_of
from tokscale.base.text import lines_of
from tokscale.dist.device import choose_device, choose_dtype
from tokscale.dist.env import ProcessEnv
from tokscale.evaluation.measures import best
from tokscale.inference.cascade import Cascade
from tokscale.inference.grids import save_grid, save_png
from tokscale.inference.pretrained import Pretrained, load_pretrained
from tokscale.inference.scorer import load_scorer
from tokscale.runs.stage import StageConfig, StageResult

log = logger("sample")


class SampleConfig(StageConfig):
    """Keys of the `sample` stage."""

    export: PathKey | None = None
    """Export folder to sample from; by default `run_dir/export`."""
    out: PathKey | None = None
    """Folder of the images; by default `run_dir/samples`."""
    prompts: tuple[str, ...] = ()
    """Captions to draw."""
    prompts_file: PathKey | None = None
    """Text file with one caption a line, in addition to `prompts`."""
    num_images: int = Field(default=1, ge=1)
    """Images per prompt, each with a seed of its own."""
    rerank: PathKey | None = None
    """Export folder of a CLIP that scores the images; those of a prompt are then kept and shown best first."""
    best_of: int = Field(default=1, ge=1)
    """Images drawn for each one that is kept; needs `rerank`. DALL-E's paper took the best of 512."""
    superres: PathKey | None = None
    """Export folder of a super-resolution model that draws finer images from those of `export` (Muse)."""
    superres_sampling: dict[str, Any] = {}
    """Its sampling options; those of `sampling` when left out."""
    batch_size: PositiveInt = 64
    """Images sampled together; bounds memory, does not change the images."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: CUDA when there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model's weights: `auto` is bf16 on a GPU that computes it, and elsewhere as they are stored."""
    sampling: dict[str, Any] = {}
    """Options of the model's own sampling configuration: `temperature`, `filter_thres`, `cond_scale`, ..."""

    @model_validator(mode="after")
    def _something_to_draw(self) -> "SampleConfig":
        if not self.prompts and self.prompts_file is None:
            raise ValueError("nothing to draw; give 'prompts=[\"a small red circle\"]' or prompts_file=FILE")
        if self.best_of > 1 and self.rerank is None:
            raise ValueError(f"best_of={self.best_of} needs something to choose with; give rerank=EXPORT of a CLIP")
        return self


CONFIG = SampleConfig


def run(config: SampleConfig, env: ProcessEnv) -> StageResult:
    """Draw every prompt; finished work of the same request is recognised and left alone."""
    del env
    export = config.export or config.run_dir / "export"
    out = config.out or config.run_dir / "samples"
    prompts = _prompts(config)
    request = _request(config, export, prompts)
    grid, listing = out / "grid.png", out / "samples.json"
    outputs = {"grid": grid, "listing": listing}
    if listing.exists() and _read_listing(listing).get("request") == request:
        return StageResult(f"{grid} already shows these {len(prompts)} prompts", outputs, skipped=True)
    require_writable(out, "give out=FOLDER")
    pretrained = _load(config, export)
    scorer = None if config.rerank is None else load_scorer(config.rerank, device=choose_device(config.device))
    drawn = config.num_images * config.best_of
    captions = [prompt for prompt in prompts for _ in range(drawn)]
    seeds = [seed_of(config.seed, "sample", prompt, i) for prompt in prompts for i in range(drawn)]
    begin = time.perf_counter()
    images = sample_batches(pretrained, captions, seeds, config.batch_size, config.sampling)
    scores: list[float | None] = [None] * len(captions)
    if scorer is not None:
        found = scorer.score(captions, images)
        kept = best(rearrange(found, "(prompts drawn) -> prompts drawn", drawn=drawn), config.num_images)
        chosen = (kept + drawn * torch.arange(len(prompts))[:, None]).flatten().tolist()
        images, scores = images[chosen], found[chosen].tolist()
        captions, seeds = [captions[i] for i in chosen], [seeds[i] for i in chosen]
    seconds = time.perf_counter() - begin
    names = [f"{index:04d}_{_slug(caption)}.png" for index, caption in enumerate(captions)]
    for name, image in zip(names, images, strict=True):
        save_png(image, out / name)
    save_grid(images, captions, grid)
    rows = [
        {"file": name, "prompt": caption, "seed": seed} | ({} if score is None else {"clip": score})
        for name, caption, seed, score in zip(names, captions, seeds, scores, strict=True)
    ]
    write_json(listing, {"request": request, "export": str(export), "sampling": config.sampling, "images": rows})
    return StageResult(
        f"{len(captions)} images in {seconds:.1f} s; look at {grid}",
        outputs,
        metrics={"images_per_second": len(prompts) * drawn / seconds},
    )


def _load(config: SampleConfig, export: Path) -> Pretrained | Cascade:
    device = choose_device(config.device)
    keys: dict[str, Any] = {"device": device, "text_encoder": config.text_encoder}
    keys["dtype"] = choose_dtype(config.dtype, device)
    if config.superres is None:
        return load_pretrained(export, **keys)
    return Cascade(load_pretrained(export, **keys), load_pretrained(config.superres, **keys), config.superres_sampling)


def sample_batches(
    pretrained: Pretrained | Cascade, captions: list[str], seeds: list[int], batch_size: int, sampling: dict[str, Any]
) -> torch.Tensor:
    """Sample `captions` in batches under a progress bar; uint8 `(captions, channels, height, width)` on the CPU."""
    images = []
    with progress(len(captions), "sampling") as bar:
        for at in range(0, len(captions), batch_size):
            part = slice(at, at + batch_size)
            images.append(pretrained.sample(captions[part], seeds=seeds[part], batch_size=batch_size, **sampling))
            bar.update(len(captions[part]))
    for words in pretrained.cut_captions():
        log.warning("%s", words)
    return torch.cat(images)


def _read_listing(listing: Path) -> dict[str, Any]:
    try:
        return read_json(listing)
    except DataError as error:
        raise DataError(f"{error}; remove it, or give another out=FOLDER") from None


def _prompts(config: SampleConfig) -> list[str]:
    prompts = list(config.prompts)
    if config.prompts_file is not None:
        try:
            prompts += lines_of(read_regular(config.prompts_file).decode("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"prompts_file: cannot read {config.prompts_file} as UTF-8 text ({error})") from None
    if not prompts:
        raise DataError(f"prompts_file: {config.prompts_file} has no prompt in it")
    return prompts


def _request(config: SampleConfig, export: Path, prompts: list[str]) -> str:
    asked = {
        "weights": _weights(export),
        "prompts": prompts,
        "num_images": config.num_images,
        "seed": config.seed,
        "sampling": config.sampling,
    }
    if config.dtype != "auto":
        asked["dtype"] = config.dtype
    if config.rerank is not None:
        asked |= {"rerank": _weights(config.rerank), "best_of": config.best_of}
    if config.superres is not None:
        asked |= {"superres": _weights(config.superres), "superres_sampling": config.superres_sampling}
    return fingerprint(asked)


def _weights(export: Path) -> str:
    manifest = export / "manifest.json"
    return sha256_file(manifest) if manifest.exists() else str(export)


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] or "image"
