"""Drawn images against real ones: what a network sees of both, and of what the tokenizer alone makes of the real."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from tokscale.base.config import fingerprint
from tokscale.base.errors import DataError
from tokscale.base.files import atomic_write
from tokscale.base.log import logger
from tokscale.base.rng import seed_of
from tokscale.base.shapes import Tensor, UInt8
from tokscale.dist.comm import Comm
from tokscale.evaluation.distances import (
    ENOUGH_FOR_FD,
    diversity,
    frechet_extrapolated,
    inception_score,
    kernel_distance,
    neighbours,
)
from tokscale.evaluation.features import Network, Seen, open_network, see, see_kept
from tokscale.evaluation.measures import NoneOfThatShapeError, Shape, load_eval_pairs
from tokscale.evaluation.quality import frechet_distance, psnr, reconstructed, ssim
from tokscale.inference.grids import interleave, save_grid
from tokscale.inference.pretrained import Pretrained
from tokscale.tokenizers.vqgan.perceptual import PerceptualConfig, PerceptualLoss

log = logger("evaluate")

Images = UInt8[Tensor, "images channels height width"]
_SHOWN = 24


@dataclass(frozen=True)
class ImagesQuestion:
    """What is to be drawn and compared."""

    reference: Path
    """Raw shards of real images with captions or classes."""
    count: int
    """Real images, and prompts."""
    per_prompt: int
    network: str
    """Name or path; see `evaluation.features.open_network`."""
    classifier: str | None
    """A network whose logits, or whose vector, are over the classes of the reference."""
    lpips: PerceptualConfig | None
    classes: bool
    """Whether the model is told classes."""
    split_lines: bool
    batch_size: int
    seed: int
    sampling: dict[str, Any]


def draw_in_parts(
    pretrained: Pretrained,
    question: ImagesQuestion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    comm: Comm,
) -> Images:
    """Draw over all ranks, keeping each batch in `folder`: whoever starts again draws only what is missing.

    Every rank returns all images. Collective.
    """
    starts = range(0, len(prompts), question.batch_size)
    for start in starts[comm.rank :: comm.world]:
        path, part = folder / f"{start:09d}.safetensors", slice(start, start + question.batch_size)
        if _kept(path) is None:
            images = pretrained.sample(
                prompts[part], seeds=seeds[part], batch_size=question.batch_size, **question.sampling
            )
            with atomic_write(path) as file:
                file.write(safetensors.torch.save({"images": images.contiguous()}))
        log.info("drew %d of %d images", min(start + question.batch_size, len(prompts)), len(prompts))
    comm.barrier()
    found = [_kept(folder / f"{start:09d}.safetensors") for start in starts]
    return torch.cat([images for images in found if images is not None])


def _kept(path: Path) -> Tensor | None:
    try:
        return safetensors.torch.load_file(path)["images"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def evaluate_images(
    pretrained: Pretrained, question: ImagesQuestion, *, request: str, folder: Path, device: torch.device, comm: Comm
) -> dict[str, Any]:
    """The report's part about images: drawn, reconstructed, and other real ones, each against the same real ones.

    Collective; the main rank's answer is whole.

    Args:
        pretrained: Draws.
        question: What.
        request: Names all that decides the images, for those that are kept until the report is there.
        folder: Gets sheets, and the features of the real images by fingerprint.
        device: Of the networks.
        comm: The job.

    Raises:
        DataError: When the reference holds fewer images than are asked for.
    """
    tokenizer, count = pretrained.image_tokenizer, question.count
    captions, classes, real, other = _reference(question, pretrained.shape)
    prompts = [caption for caption in captions for _ in range(question.per_prompt)]
    turns = [number for _ in captions for number in range(question.per_prompt)]
    seeds = [seed_of(question.seed, "evaluate", p, n) for p, n in zip(prompts, turns, strict=True)]
    parts = folder / "evaluate" / request[:16]
    drawn = draw_in_parts(pretrained, question, prompts, seeds, parts, comm)
    if len(drawn) != len(prompts):
        raise DataError(f"{parts}: {len(drawn)} of {len(prompts)} images were drawn; start again to draw the rest")
    if not comm.is_main:
        return {}
    network = open_network(question.network, device)
    _, rebuilt = reconstructed(tokenizer, real)
    seen, identity = see_kept(network, real, folder / "features")
    found: dict[str, Any] = {
        "about": network.about
        | {
            "reference": str(question.reference),
            "reference_fingerprint": identity,
            "real": len(real),
            "prompts": len(captions),
            "per_prompt": question.per_prompt,
            "seeds": f"seed_of({question.seed}, 'evaluate', prompt, number)",
            "seeds_fingerprint": fingerprint({"seeds": seeds}),
        },
        "drawn": compare(seen, see(network, drawn), question.seed),
        "reconstructed": compare(seen, see(network, rebuilt), question.seed) | _fidelity(question, real, rebuilt),
    }
    if len(other) == count:
        found["real"] = compare(seen, see_kept(network, other, folder / "features")[0], question.seed)
    if question.per_prompt > 1:
        found["diversity"] = diversity(see(network, drawn).features, prompts)
    if question.classifier is not None:
        classifier = open_network(question.classifier, device)
        asked = [number for number in classes for _ in range(question.per_prompt)]
        sets = {"drawn": (drawn, asked), "reconstructed": (rebuilt, classes), "real": (real, classes)}
        found["class_accuracy"] = {"about": classifier.about} | {
            name: _class_accuracy(classifier, images, told) for name, (images, told) in sets.items()
        }
    shown = [number for number in range(0, len(prompts), question.per_prompt)][:_SHOWN]
    trio = interleave(real[: len(shown)], rebuilt[: len(shown)], drawn[shown])
    labels = [words for caption in captions[: len(shown)] for words in (caption, "rebuilt", "drawn")]
    save_grid(trio, labels, folder / "samples" / "beside.png", columns=12)
    shutil.rmtree(parts, ignore_errors=True)
    return found


def _reference(question: ImagesQuestion, shape: int | Shape) -> tuple[list[str], list[str], Images, Images]:
    """What the model is told, classes for a classifier, real images, and as many others where there are enough.

    The others say what a perfect score is.
    """
    read = partial(load_eval_pairs, question.reference, shape, at_most=2 * question.count)
    told, images = read(split_lines=question.split_lines, classes=question.classes)
    if len(images) < question.count:
        refused = NoneOfThatShapeError if isinstance(shape, Shape) else DataError
        raise refused(
            f"{question.reference}: holds {len(images)} usable images, count={question.count} are asked for; give "
            "another reference, or a smaller count"
        )
    classes = told if question.classes else read(classes=True)[0] if question.classifier is not None else []
    if classes and len(classes) != len(told):
        raise DataError(
            f"{question.reference}: {len(classes)} images have a class and {len(told)} a caption; class accuracy of a "
            "model that reads captions needs both of every image"
        )
    if len(images) < 2 * question.count:
        return told[: question.count], classes[: question.count], images[: question.count], images[:0]
    return told[::2], classes[::2], images[::2], images[1::2]


def compare(real: Seen, other: Seen, seed: int = 0) -> dict[str, Any]:
    """A set of images against real ones, by what a network saw of both."""
    distance = kernel_distance(real.features, other.features)
    found: dict[str, Any] = {
        "count": len(other.features),
        "kid": distance.value,
        "kid_error": distance.error,
        "fd": frechet_distance(real.features, other.features),
        "fd_extrapolated": frechet_extrapolated(real.features, other.features, seed),
        "fd_is_a_level": min(len(real.features), len(other.features)) >= ENOUGH_FOR_FD,
        **neighbours(real.features, other.features),
    }
    if other.logits is not None:
        found["inception_score"] = inception_score(other.logits)
    return found


def _fidelity(question: ImagesQuestion, real: Images, rebuilt: Images) -> dict[str, Any]:
    found: dict[str, Any] = {"psnr": psnr(real, rebuilt), "ssim": ssim(real, rebuilt)}
    if question.lpips is not None:
        loss = PerceptualLoss.from_files(question.lpips)
        with torch.no_grad():
            values = [
                loss(b.float() / 255, a.float() / 255).item() * len(a)
                for a, b in zip(real.split(16), rebuilt.split(16), strict=True)
            ]
        found["lpips"] = sum(values) / len(real)
    return found


def _class_accuracy(classifier: Network, images: Images, told: Sequence[str]) -> float:
    """Share of images whose likeliest class is the one that was asked for."""
    seen = see(classifier, images)
    logits = seen.features if seen.logits is None else seen.logits
    wanted = torch.tensor([int(words) for words in told])
    most = int(wanted.max())
    if most >= logits.shape[1]:
        raise DataError(
            f"classifier: {classifier.name} knows {logits.shape[1]} classes, the reference has class {most}"
        )
    return (logits.argmax(-1) == wanted).double().mean().item()
