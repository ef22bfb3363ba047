"""What is measured on pictures with captions: a model's loss, told and not told, and how well CLIP thinks they fit."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tokscale.base.batch import TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.errors import DataError
from tokscale.base.shapes import Tensor, UInt8
from tokscale.data.images import centre_square, decode_picture
from tokscale.data.raw_shards import RawDataset
from tokscale.stages.pretrained import Pretrained
from tokscale.stages.scorer import Scorer, retrieval_rank


def pairs(
    raw: Path, side: int, *, at_most: int | None = None
) -> tuple[list[str], UInt8[Tensor, "batch channels side side"]]:
    """First captions and pictures of raw shards, spread over the whole set when it holds more than `at_most`.

    Raises:
        DataError: When there are none.
    """
    dataset = RawDataset(raw)
    count = len(dataset) if at_most is None else min(at_most, len(dataset))
    if not count:
        raise DataError(f"{raw}: no pictures; write some with tokscale prepare output={raw.name}")
    captions, pictures = [], []
    for number in range(count):
        shard, sample = dataset.sample(number * len(dataset) // count)
        captions.append(shard.caption(sample).splitlines()[0])
        pictures.append(centre_square(decode_picture(shard.picture(sample)), side))
    return captions, torch.stack(pictures)


@torch.inference_mode()
def losses(
    pretrained: Pretrained,
    captions: Sequence[str],
    pictures: UInt8[Tensor, "batch channels height width"],
    batch_size: int,
    *,
    told: bool = True,
) -> dict[str, float]:
    """Mean of the model's loss and its parts over pictures.

    Args:
        pretrained: The model.
        captions: One for each picture.
        pictures: Of its image tokenizer's size.
        batch_size: Pictures at once.
        told: False gives the model no caption, which is what guidance compares with: its unconditional loss.
    """
    sums: dict[str, float] = {}
    for at in range(0, len(captions), batch_size):
        part = slice(at, at + batch_size)
        text, mask, extra = pretrained.prompts(captions[part])
        if not told:
            mask = torch.zeros_like(mask)
            extra |= {name: torch.zeros_like(extra[name]) for name in (TEXT_EMBEDS_MASK,) if name in extra}
        codes = pretrained.image_tokenizer.encode(pictures[part].to(pretrained.device))
        batch = TokenBatch(torch.arange(len(text)), text, mask, codes, extra=extra).to(pretrained.device)
        loss = pretrained.model(batch)
        for name, value in {"total": loss.total, **loss.parts}.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(text)
    return {name: value / len(captions) for name, value in sums.items()}


def fit(
    scorer: Scorer, captions: Sequence[str], pictures: UInt8[Tensor, "captions channels height width"], top: int
) -> dict[str, float]:
    """How well pictures fit their captions, by a CLIP.

    Returns:
        `score`: 100 times the mean cosine of the pairs, negative ones counted as 0 (Hessel et al. 2021,
        arXiv:2104.08718); `found`: share of pictures whose own caption is among the `top` best of all captions;
        `chance`: what guessing finds; `times_chance`: their ratio.
    """
    words, seen = scorer.encode_captions(captions), scorer.encode_pictures(pictures)
    found = (retrieval_rank(words, seen) < top).double().mean().item()
    chance = min(top / len(captions), 1.0)
    return {
        "score": 100 * (words * seen).sum(-1).clamp(min=0).mean().item(),
        "found": found,
        "top": float(top),
        "pool": float(len(captions)),
        "chance": chance,
        "times_chance": found / chance,
    }
