"""`bench dalle`: training, the loss head and sampling of DALL-E beside dalle-pytorch.

Both sides have the same sizes and draw the same batches; losses over a short training from the same weights must be
equal. What the original's default sampling path takes is worked out from single steps, since one image takes hours.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from tokscale.base import rng
from tokscale.base.batch import TokenBatch
from tokscale.base.config import Config
from tokscale.bench.comparison import Comparison, original, ours
from tokscale.bench.measure import row
from tokscale.models.dalle import DALLE, DALLEConfig, DALLESampling
from tokscale.models.dalle.original import config_from_original, state_dict_from_original
from tokscale.nn.config import AttentionKindName
from tokscale.nn.head import VocabularyHead
from tokscale.nn.strides import transpose_weights_for_decoding

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
KINDS: dict[str, tuple[AttentionKindName, ...]] = {
    "full": ("full",),
    "mixed": ("full", "axial_row", "axial_col", "conv_like"),
}
SMALL = {"dim": 64, "depth": 4, "heads": 2, "dim_head": 32, "words": 200, "codes": 128, "text": 16, "grid": 8}
"""For loss curves."""
SAME = 1e-5
"""Losses of fifty updates are equal when none differs by more, relatively: training makes rounding grow."""
_PLACES = (0.0, 0.5, 1.0)


class DalleBench(Config):
    """What `bench dalle` measures."""

    parts: tuple[Literal["curve", "head", "step", "sample"], ...] = ("curve", "head", "step", "sample")
    """Loss curves, the loss head, whole training steps, sampling."""
    kinds: tuple[Literal["full", "mixed"], ...] = ("full", "mixed")
    """Attention of the training steps: `full`, or `full, axial_row, axial_col, conv_like` in turn."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of the training steps' weights and activations."""
    dim: int = Field(default=512, ge=1)
    """Width."""
    depth: int = Field(default=12, ge=1)
    """Layers."""
    heads: int = Field(default=8, ge=1)
    """Attention heads, of 64."""
    words: int = Field(default=10_000, ge=2)
    """Entries of the text vocabulary, padding left out."""
    codes: int = Field(default=8192, ge=2)
    """Entries of the codebook."""
    text: int = Field(default=256, ge=1)
    """Caption tokens."""
    grid: int = Field(default=32, ge=2)
    """Side of the grid of codes."""
    batch: int = Field(default=4, ge=1)
    """Samples of a step."""
    rounds: int = Field(default=2, ge=1)
    """Interleaved rounds of the training steps and the loss head; the best of each side counts."""
    warm: bool = True
    """Whether a round that is not counted comes before them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where both sides compute: one thread's CPU time, or time between synchronisations of a GPU."""

    @property
    def sizes(self) -> dict[str, Any]:
        """What both sides are built from."""
        names = ("dim", "depth", "heads", "words", "codes", "text", "grid")
        return {name: getattr(self, name) for name in names} | {"dim_head": 64}


CONFIG = DalleBench


def rows(config: DalleBench) -> Iterator[dict[str, Any]]:
    """Measure."""
    with Comparison(config.device) as comparison:
        if "curve" in config.parts:
            yield _curves(comparison)
        if "head" in config.parts:
            yield from _heads(config, comparison)
        if "step" in config.parts:
            yield from _steps(config, comparison)
        if "sample" in config.parts:
            yield from _samples(config, comparison)


def _steps(config: DalleBench, comparison: Comparison) -> Iterator[dict[str, Any]]:
    for dtype in config.dtypes:
        for kinds in config.kinds:
            options = config.sizes | {"kinds": KINDS[kinds], "dtype": DTYPES[dtype], "batch_size": config.batch}
            case = f"dalle/step/{kinds}-{config.batch}x{config.text}+{config.grid}x{config.grid}/{dtype}"
            sides = ours(f"{__name__}:step", **options), original("dalle.py:step", **options)
            again = {"rounds": config.rounds, "warm": config.warm}
            yield from comparison.rows(case, sides[0], original=sides[1], **again, time=1.8, memory=2.0, limit=True)


def _heads(config: DalleBench, comparison: Comparison) -> Iterator[dict[str, Any]]:
    names = ("dim", "words", "codes", "text", "grid")
    options = {name: getattr(config, name) for name in names} | {"batch_size": config.batch, "dtype": "float32"}
    case = f"dalle/head/{config.batch}x{config.text}+{config.grid}x{config.grid}/fp32"
    mine, theirs = ours(f"{__name__}:head", **options), original("dalle.py:head", **options)
    yield from comparison.rows(case, mine, original=theirs, rounds=config.rounds, time=3.0, memory=4.0)
    products = ours(f"{__name__}:head_products", **options)
    yield from comparison.rows(case, mine, products=products, rounds=config.rounds, time=0.8, measure_memory=False)


def _samples(config: DalleBench, comparison: Comparison) -> Iterator[dict[str, Any]]:
    options = config.sizes | {"kinds": KINDS["full"], "dtype": "float32"}
    case = f"dalle/sample/full-1x{config.text}+{config.grid}x{config.grid}/fp32"
    mine, cached = ours(f"{__name__}:sample", **options), original("dalle.py:sample_cached", **options)
    found = comparison.measure({"ours": mine, "cached": cached}, rounds=1, memory=False, warm=False)
    image = config.grid**2
    each = [
        comparison.measure(
            {"original": original("dalle.py:forward_at", at=round(place * (image - 1)), **options)},
            rounds=1,
            memory=False,
        )["original"].seconds
        for place in _PLACES
    ]
    # A pass grows smoothly with its length, so Simpson's rule over three of them gives the sum of all.
    default = image * (each[0] + 4 * each[1] + each[2]) / 6
    own = found["ours"].seconds
    yield row(f"{case}/vs-default-path/time", own, default, "s", 50.0)
    yield row(f"{case}/vs-cached-path/time", own, found["cached"].seconds, "s", 1.15)


def _curves(comparison: Comparison) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        options = SMALL | {"kinds": KINDS["mixed"], "dtype": "float32"}
        options |= {"weights": str(Path(folder) / "weights.pt"), "steps": 50, "batch_size": 4, "lr": 1e-3}
        # The original's side is made first: it writes the weights.
        sides = {"original": original("dalle.py:curve", **options), "ours": ours(f"{__name__}:curve", **options)}
        found = comparison.measure(sides, rounds=1, memory=False, warm=False)
    mine, theirs = found["ours"].result, found["original"].result
    apart = max(abs(a - b) / b for a, b in zip(mine, theirs, strict=True))
    assert theirs[-1] < 0.9 * theirs[0], "a curve that does not fall compares nothing"
    return row("dalle/curve/50-steps/fp32/vs-original", max(apart, 1e-12), SAME, "relative difference", 1.0)


def _model(
    *, words: int, codes: int, text: int, grid: int, kinds: Sequence[AttentionKindName], dtype: str, **options: Any
) -> DALLE:
    sizes = {"num_text_tokens": words, "num_image_tokens": codes, "text_seq_len": text, "image_grid": (grid, grid)}
    with rng.scope(0, "bench", "dalle"):
        return DALLE(DALLEConfig(attn_types=tuple(kinds), **sizes, **options)).to(getattr(torch, dtype))


def _batch(size: int, words: int, codes: int, text: int, grid: int, seed: int = 0) -> TokenBatch:
    """Drawn as `tests/originals/dalle.py` draws it."""
    draw = torch.Generator().manual_seed(seed)
    captions = torch.randint(1, words, (size, text), generator=draw)
    images = torch.randint(0, codes, (size, grid * grid), generator=draw).unflatten(1, (grid, grid))
    return TokenBatch(torch.arange(size), captions, torch.ones_like(captions, dtype=torch.bool), images)


def _sizes(options: dict[str, Any]) -> tuple[int, int, int, int]:
    return options["words"], options["codes"], options["text"], options["grid"]


def step(*, batch_size: int, **options: Any) -> Callable[[], object]:
    """Loss and gradients of one batch."""
    model, batch = _model(**options), _batch(batch_size, *_sizes(options))

    def call() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(batch).total
        loss.backward()
        return loss.item()

    return call


def head(
    *, batch_size: int, dim: int, words: int, codes: int, text: int, grid: int, dtype: str
) -> Callable[[], object]:
    """From hidden states to the loss and its gradients: two vocabularies, in chunks."""
    heads, hidden, batch = _head_inputs(batch_size, dim, words, codes, text, grid, dtype)

    def call() -> float:
        for module in heads:
            module.zero_grad(set_to_none=True)
        hidden.grad = None
        text_loss, _ = heads[0](hidden[:, :text], batch.text)
        image_loss, _ = heads[1](hidden[:, text:], batch.codes.flatten(1))
        loss = (text_loss + 7 * image_loss) / 8
        loss.backward()
        return loss.item()

    return call


def head_products(
    *, batch_size: int, dim: int, words: int, codes: int, text: int, grid: int, dtype: str
) -> Callable[[], object]:
    """The matrix products alone that any such loss needs: logits, and the gradients of hidden states and weights."""
    heads, hidden, _ = _head_inputs(batch_size, dim, words, codes, text, grid, dtype)
    parts = [hidden.detach()[:, :text].flatten(0, 1), hidden.detach()[:, text:].flatten(0, 1)]
    rows_at_once = [max((1 << 22) // len(module.weight), 64) for module in heads]

    @torch.no_grad()
    def call() -> None:
        for module, part, rows in zip(heads, parts, rows_at_once, strict=True):
            for chunk in part.split(rows):
                logits = chunk @ module.weight.t()
                torch.mm(logits, module.weight)
                torch.mm(logits.t(), chunk)

    return call


def _head_inputs(
    batch_size: int, dim: int, words: int, codes: int, text: int, grid: int, dtype: str
) -> tuple[list[VocabularyHead], torch.Tensor, TokenBatch]:
    exact = getattr(torch, dtype)
    with rng.scope(0, "bench", "head"):
        heads = [VocabularyHead(dim, words + text).to(exact), VocabularyHead(dim, codes).to(exact)]
    hidden = torch.randn(batch_size, text + grid * grid, dim, generator=torch.Generator().manual_seed(1))
    return heads, hidden.to(exact).requires_grad_(), _batch(batch_size, words, codes, text, grid)


def sample(**options: Any) -> Callable[[], object]:
    """The codes of one image."""
    model, batch = _model(**options).eval(), _batch(1, *_sizes(options))
    transpose_weights_for_decoding(model)  # as a model has it that was loaded from an export
    return lambda: model.generate_codes(batch.text, batch.text_mask, options=DALLESampling(), seeds=[0])


def curve(*, weights: str, steps: int, batch_size: int, lr: float, **options: Any) -> Callable[[], object]:
    """Training from the other side's weights with Adam: the loss of each step."""
    words, codes, text, grid = _sizes(options)
    hparams = {"num_text_tokens": words, "text_seq_len": text, "attn_types": options["kinds"]}
    hparams |= {name: options[name] for name in ("dim", "depth", "heads", "dim_head")}
    config = config_from_original(hparams, num_image_tokens=codes, image_grid=(grid, grid))
    model = DALLE(config)
    state = state_dict_from_original(torch.load(weights, weights_only=True), config)

    def call() -> list[float]:
        model.load_state_dict(state)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        losses = []
        for number in range(steps):
            loss = model(_batch(batch_size, words, codes, text, grid, seed=number % 4)).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return call
