"""Drawing codes and captions from the network, one entry at a time, with everything before it in a cache."""

from collections.abc import Sequence

import torch

from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Bool, Float, Int, Tensor
from tokscale.models.dalle.config import DALLESampling
from tokscale.models.dalle.network import START, DALLENetwork
from tokscale.nn.attention.decode import DeviceStep
from tokscale.nn.layout import TokenLayout
from tokscale.nn.replay import StepRunner
from tokscale.nn.sampling import SampleStreams, sample_ids


def init_codes(layout: TokenLayout, options: DALLESampling) -> int:
    """How many codes of a priming image to keep.

    Raises:
        ConfigError: When none would be left to draw.
    """
    count = options.num_init_img_tokens
    count = int(0.4375 * layout.image) if count is None else count
    if count >= layout.image:
        raise ConfigError(
            f"sampling.num_init_img_tokens: got {count} of {layout.image} codes, which leaves none to draw"
        )
    return count


def sample_codes(
    net: DALLENetwork,
    text: Int[Tensor, "batch text"],
    text_mask: Bool[Tensor, "batch text"],
    prime: Int[Tensor, "batch primed"],
    options: DALLESampling,
    seeds: Sequence[int],
    layout: TokenLayout,
) -> Int[Tensor, "batch image"]:
    """Draw what follows the captions and the first codes.

    With guidance, each caption and its empty twin go through the network as rows of one batch with one cache, so that
    neither sees the other's entries.
    """
    ids = net.text_ids(text, text_mask)
    guided = options.guided
    if guided:
        ids = torch.cat([ids, net.text_ids(torch.zeros_like(text))])
    codes = prime.new_zeros(len(text), layout.image)
    codes[:, : prime.shape[1]] = prime
    x = net.embed_text(ids)
    if prime.shape[1]:
        x = torch.cat([x, net.embed_codes(_twice(prime, guided), layout=layout)], dim=1)
    cache = net.stack.new_cache(len(ids), device=x.device, dtype=x.dtype, layout=layout)
    first, *others = range(prime.shape[1], layout.image)
    streams = SampleStreams(seeds, [f"code/{at}" for at in (first, *others)], codes.device)

    def drawn(x: Tensor, at: int | Tensor, step: DeviceStep | None = None) -> Tensor:
        logits = net.image_head(net.read(x, cache, step)[:, -1]).float()
        if guided:
            logits = options.guide(logits, at, layout.image)
        return _draw(logits, options, streams, f"code/{at}" if isinstance(at, int) else at - first)

    codes[:, first] = drawn(x, first)
    if not StepRunner.wanted(codes.device):
        for at in others:
            x = net.embed_codes(_twice(codes[:, at - 1 : at], guided), start=at - 1, layout=layout)
            codes[:, at] = drawn(x, at)
        return codes

    at = torch.full((1,), first + 1, device=codes.device)

    def step(reach: int) -> None:
        """Draw code `at`, from the code before it."""
        x = net.embed_codes(_twice(codes.index_select(1, at - 1), guided), start=at - 1, layout=layout)
        code = drawn(x, at, DeviceStep(layout.text + at - 1, reach))
        codes.index_copy_(1, at, code[:, None])
        at.add_(1)

    runner = StepRunner(step, codes.device)
    for count in others:
        runner.run(count, most=layout.image)
    return codes


def sample_text(
    net: DALLENetwork,
    prefix: Int[Tensor, "batch text"],
    options: DALLESampling,
    seeds: Sequence[int],
) -> Int[Tensor, "batch text"]:
    """Captions that go on from a prefix, right-padded with 0.

    As in training: the start token stands first, and padding is an entry of the vocabulary like any other, one per
    position. A caption ends where it is drawn.

    Args:
        net: The network.
        prefix: Ids to keep, right-padded with 0; all 0 starts from nothing.
        options: Guidance and priming do not apply.
        seeds: One per caption.
    """
    rows, length = prefix.shape
    device = prefix.device
    text, ended = torch.zeros_like(prefix), torch.zeros(rows, dtype=torch.bool, device=device)
    entry, at = torch.full_like(prefix[:, :1], START), torch.zeros(1, dtype=torch.long, device=device)
    dtype = net.embed_text(entry).dtype
    cache = net.stack.new_cache(rows, device=device, dtype=dtype)
    streams = SampleStreams(seeds, [f"text/{place}" for place in range(length)], device)
    blind = StepRunner.wanted(device)

    def step(reach: int) -> None:
        """Draw what follows entry `at`, which becomes the next entry."""
        x = net.embed_text(entry, start=at)
        x = net.read(x, cache, DeviceStep(at, reach, in_text=True) if blind else None)
        logits = net.text_head(x[:, -1]).float()
        # Legal here: every word, and this position's own padding.
        padding = net.words + at
        legal = torch.cat([logits[:, 1 : net.words], logits.index_select(1, padding)], dim=1)
        drawn = _draw(legal, options, streams, at)[:, None] + 1
        begun = prefix.index_select(1, at)
        drawn = torch.where(begun != 0, begun, drawn)
        ended.logical_or_(drawn[:, 0] == net.words)
        text.index_copy_(1, at, torch.where(ended[:, None], 0, drawn))
        entry.copy_(torch.where(ended[:, None], padding, drawn))
        at.add_(1)

    runner = StepRunner(step, device)
    for count in range(1, length + 1):
        runner.run(count, most=length)
    return text


def _draw(
    logits: Float[Tensor, "batch legal"],
    options: DALLESampling,
    streams: SampleStreams,
    step: str | Int[Tensor, "1"],
) -> Int[Tensor, " batch"]:
    """One entry per row of the legal slice of a vocabulary."""
    return sample_ids(
        logits,
        streams,
        step,
        temperature=options.temperature,
        filter_thres=options.filter_thres,
        top_p_mass=options.top_p,
    )


def _twice(codes: Int[Tensor, "batch n"], doubled: bool) -> Int[Tensor, "rows n"]:
    return torch.cat([codes, codes]) if doubled else codes
