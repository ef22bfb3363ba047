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
    text, ended = torch.zeros_like(prefix), torch.zeros(len(prefix), dtype=torch.bool, device=prefix.device)
    entry = torch.full_like(prefix[:, 0], START)
    cache, places = None, range(net.config.text_seq_len)
    streams = SampleStreams(seeds, [f"text/{at}" for at in places], prefix.device)
    for at in places:
        x = net.embed_text(entry[:, None], start=at)
        cache = cache or net.stack.new_cache(len(x), device=x.device, dtype=x.dtype)
        logits = net.text_head(net.read(x, cache)[:, -1]).float()
        # Legal here: every word, and this position's own padding.
        legal = torch.cat([logits[:, 1 : net.words], logits[:, net.words + at, None]], dim=1)
        drawn = _draw(legal, options, streams, f"text/{at}") + 1
        drawn = torch.where(prefix[:, at] != 0, prefix[:, at], drawn)
        ended = ended | (drawn == net.words)
        text[:, at] = torch.where(ended, 0, drawn)
        entry = torch.where(ended, net.words + at, drawn)
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
