"""Drawn images against real ones: what a network sees of both, and of what the tokenizer alone makes of the real."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
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
    LEAST_FOR_KID,
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
        DataError: When the reference holds fewer images than are asked for, or classes that the classifier does not
            know.
    """
    captions, classes, real, other = _reference(question, pretrained.shape)
    different = _different(question, real, comm)
    with comm.raise_together("opening what looks at the images"):  # before hours of drawing for it
        judges = _Judges.of(question, real, classes, device) if comm.is_main else None
    prompts = [caption for caption in captions for _ in range(question.per_prompt)]
    turns = [number for _ in captions for number in range(question.per_prompt)]
    seeds = [seed_of(question.seed, "evaluate", p, n) for p, n in zip(prompts, turns, strict=True)]
    parts = folder / "evaluate" / request[:16]
    drawn = draw_in_parts(pretrained, question, prompts, seeds, parts, comm)
    if len(drawn) != len(prompts):
        raise DataError(f"{parts}: {len(drawn)} of {len(prompts)} images were drawn; start again to draw the rest")
    if judges is None:
        return {}
    network = judges.network
    _, rebuilt = reconstructed(pretrained.image_tokenizer, real)
    seen, identity = see_kept(network, real, folder / "features")
    seen_drawn = see(network, drawn)
    found: dict[str, Any] = {
        "about": network.about
        | {
            "reference": str(question.reference),
            "reference_fingerprint": identity,
            "real": len(real),
            "real_different": different,
            "prompts": len(captions),
            "per_prompt": question.per_prompt,
            "seeds": f"seed_of({question.seed}, 'evaluate', prompt, number)",
            "seeds_fingerprint": fingerprint({"seeds": seeds}),
        },
        "drawn": compare(seen, seen_drawn, question.seed),
        "reconstructed": compare(seen, see(network, rebuilt), question.seed)
        | _fidelity(judges.perceptual, real, rebuilt),
    }
    if len(other) == question.count:
        found["real"] = compare(seen, see_kept(network, other, folder / "features")[0], question.seed)
    if question.per_prompt > 1:
        found["diversity"] = diversity(seen_drawn.features, prompts)
    if judges.classifier is not None:
        asked = [number for number in classes for _ in range(question.per_prompt)]
        sets = {"drawn": (drawn, asked), "reconstructed": (rebuilt, classes), "real": (real, classes)}
        found["class_accuracy"] = _class_accuracies(judges.classifier, sets)
    _show_beside(captions, real, rebuilt, drawn[:: question.per_prompt], folder / "samples" / "beside.png")
    shutil.rmtree(parts, ignore_errors=True)
    return found


def _show_beside(captions: Sequence[str], real: Images, rebuilt: Images, drawn: Images, path: Path) -> None:
    """A sheet of the first images: real, rebuilt, and the one drawn for its caption."""
    shown = slice(_SHOWN)
    labels = [words for caption in captions[shown] for words in (caption, "rebuilt", "drawn")]
    save_grid(interleave(real[shown], rebuilt[shown], drawn[shown]), labels, path, columns=12)


def _different(question: ImagesQuestion, real: Images, comm: Comm) -> int:
    """How many of the real images are different from each other."""
    found = len({hashlib.sha256(image.numpy().tobytes()).digest() for image in real})
    if found < LEAST_FOR_KID / 2:
        raise DataError(
            f"{question.reference}: {len(real)} images of which {found} are different, too few to compare with; give a "
            "reference without repetitions"
        )
    if found < len(real) and comm.is_main:
        log.warning("%s: %d of %d images repeat another", question.reference, len(real) - found, len(real))
    return found


@dataclass(frozen=True)
class _Judges:
    """What looks at the images."""

    network: Network
    classifier: Network | None
    perceptual: PerceptualLoss | None

    @classmethod
    def of(
        cls, question: ImagesQuestion, real: Images, classes: Sequence[str], device: torch.device | str = "cpu"
    ) -> "_Judges":
        """Those that are asked for, tried on a real image."""
        network = open_network(question.network, device)
        see(network, real[:1])
        classifier = None if question.classifier is None else open_network(question.classifier, device)
        if classifier is not None:
            known, most = _logits(see(classifier, real[:1])).shape[1], max(map(int, classes))
            if most >= known:
                raise DataError(
                    f"classifier: {classifier.name} knows {known} classes, {question.reference} has class {most}; give "
                    "the classifier of these classes, or leave the key out"
                )
        return cls(network, classifier, None if question.lpips is None else PerceptualLoss.from_files(question.lpips))


def _reference(question: ImagesQuestion, shape: int | Shape) -> tuple[list[str], list[str], Images, Images]:
    """What the model is told, classes for a classifier, real images, and as many others where there are enough.

    The others say what a perfect score is.
    """
    read = partial(load_eval_pairs, question.reference, shape, at_most=2 * question.count)
    told, images = read(split_lines=question.split_lines, classes=question.classes)
    if len(images) < question.count:
        refused = NoneOfThatShapeError if isinstance(shape, Shape) else DataError
        fewer = f", or a count of {len(images)}" if len(images) >= LEAST_FOR_KID else ""
        raise refused(
            f"{question.reference}: holds {len(images)} usable images, count={question.count} are asked for; give "
            f"a reference with more{fewer} (a comparison needs at least {LEAST_FOR_KID})"
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


def _fidelity(loss: PerceptualLoss | None, real: Images, rebuilt: Images) -> dict[str, Any]:
    found: dict[str, Any] = {"psnr": psnr(real, rebuilt), "ssim": ssim(real, rebuilt)}
    if loss is not None:
        with torch.no_grad():
            values = [
                loss(b.float() / 255, a.float() / 255).item() * len(a)
                for a, b in zip(real.split(16), rebuilt.split(16), strict=True)
            ]
        found["lpips"] = sum(values) / len(real)
    return found


def _class_accuracies(classifier: Network, sets: Mapping[str, tuple[Images, Sequence[str]]]) -> dict[str, Any]:
    found = {name: _class_accuracy(classifier, images, told) for name, (images, told) in sets.items()}
    return {"about": classifier.about, **found}


def _class_accuracy(classifier: Network, images: Images, told: Sequence[str]) -> float:
    """Share of images whose likeliest class is the one that was asked for."""
    wanted = torch.tensor([int(words) for words in told])
    return (_logits(see(classifier, images)).argmax(-1) == wanted).double().mean().item()


def _logits(seen: Seen) -> Tensor:
    return seen.features if seen.logits is None else seen.logits
