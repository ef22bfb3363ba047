"""`bench tokenize`: how near the pipeline comes to its slowest stage alone, and decoding beside Pillow.

On a CPU decoding and encoding share the cores, so overlap is measured with an encoder that only waits, as an
accelerator lets its host wait; decoding is measured by CPU time, so that neighbours on the machine count as little as
they can. With `device=cuda` a network of realistic cost encodes.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from tokscale.base.config import Config, PathKey
from tokscale.base.protocols import ImageTokenizer
from tokscale.base.shapes import Int, Tensor, UInt8
from tokscale.bench.measure import interleaved, resident_bytes, row
from tokscale.data.raw.images import centre_square, decode_image
from tokscale.data.raw.places import LocalRaw
from tokscale.data.raw.shards import RawRecord, write_shard
from tokscale.data.tokenization.config import FilterConfig, TextConfig, TransformConfig, VariantConfig
from tokscale.data.tokenization.inputs import Fetched, list_inputs, make_image, read_chunks
from tokscale.data.tokenization.pipeline import Pipeline
from tokscale.data.tokenization.plan import Unit
from tokscale.data.tokenization.recipe import Recipe
from tokscale.data.tokenization.units import unit_writer
from tokscale.data.tokens.manifest import CODES
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.dvae.config import DiscreteVAEConfig
from tokscale.tokenizers.dvae.model import DiscreteVAE


class TokenizeBench(Config):
    """What `bench tokenize` measures with."""

    images: int = Field(default=1536, ge=64)
    """JPEGs that are tokenized in a round; a unit of work has forty times as many by default."""
    source_side: int = Field(default=512, ge=32)
    """Their side in pixels."""
    image_size: int = Field(default=256, ge=16)
    """Side of the images that are encoded."""
    encode_batch: int = Field(default=64, ge=1)
    """Images of a batch."""
    slowdown: float = Field(default=2.0, gt=0)
    """When encoding is the slowest stage: how many times as long it takes as decoding."""
    threads: int = Field(default=1, ge=1)
    """Decoding threads."""
    memory_images: int = Field(default=100_000, ge=100)
    """Small images after which memory should not have grown."""
    rounds: int = Field(default=3, ge=1)
    """Measurements of each side; the best counts."""
    device: Literal["cpu", "cuda"] = "cpu"
    """On `cuda`, also a discrete VAE beside its own speed without a pipeline."""
    folder: PathKey | None = None
    """Where to write; by default the system's temporary folder."""


CONFIG = TokenizeBench


def rows(config: TokenizeBench) -> Iterator[dict[str, Any]]:
    """The rows of the report, each as soon as it is measured."""
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        jpegs = _write_images(folder / "raw", config)
        size = f"{config.source_side}-to-{config.image_size}"
        yield from _decoding(config, jpegs[:64], size)
        yield from _bounds(config, folder, size)
        if config.device == "cuda":
            yield _on_the_device(config, folder, size)
        yield _flat_memory(config, folder)


class _Waiting:
    """A tokenizer whose encoding takes a fixed time of waiting, as an accelerator's host does."""

    num_tokens, channels, code_shape, fingerprint = 256, 3, (16, 16), "bench"

    def __init__(self, image_size: int, seconds: float):
        self.image_size, self.seconds = image_size, seconds
        self.image_hw = image_size, image_size

    def encode(self, pixels: UInt8[Tensor, "batch channels height width"]) -> Int[Tensor, "batch *code_shape"]:
        time.sleep(self.seconds)
        step = max(1, self.image_size // 16)
        return pixels[:, 0, ::step, ::step][:, :16, :16].long()

    def decode(self, codes: Int[Tensor, "batch *code_shape"]) -> UInt8[Tensor, "batch channels height width"]:
        raise AssertionError("the bench decodes nothing")


def _natural(values: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """Noise with the 1/f spectrum and the weak colours of photographs: about 85 KB as a JPEG of 512 pixels."""
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequencies[0, 0] = frequencies[0, 1]
    noise = np.fft.ifft2(np.fft.fft2(values.normal(size=(4, side, side))) / frequencies**1.4).real
    noise /= noise.std((1, 2), keepdims=True)
    coloured = 128 + 48 * noise[0] + 12 * noise[1:]
    return np.clip(coloured, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _write_images(raw: Path, config: TokenizeBench) -> list[bytes]:
    values = np.random.default_rng(0)
    jpegs = [_jpeg(_natural(values, config.source_side)) for _ in range(64)]
    records = (RawRecord(f"{n:09d}", jpegs[n % 64], "jpg", f"image {n}") for n in range(config.images))
    write_shard(raw / "00000.tar", records)
    return jpegs


def _recipe(folder: Path, config: TokenizeBench, tokenizer: ImageTokenizer) -> Recipe:
    return Recipe(
        raw=LocalRaw(folder / "raw"),
        tokenizers={CODES: tokenizer},
        text_tokenizer=None,
        transform=TransformConfig(),
        variants=VariantConfig(),
        filters=FilterConfig(),
        text=TextConfig(),
        scores=(),
        encode_batch=config.encode_batch,
        block_size=256,
    )


def _run(folder: Path, config: TokenizeBench, tokenizer: ImageTokenizer, unit: Unit) -> float:
    """Seconds of one unit, wall time, without the commit."""
    recipe, device = _recipe(folder, config, tokenizer), torch.device(config.device)
    pipeline = Pipeline(recipe, threads=config.threads, queue=0, device=device, stop=lambda: False)
    try:
        with unit_writer(folder / "tokens", unit, "bench", {}, "bench") as writer:
            began = time.perf_counter()
            pipeline.run(unit, {"": writer}, lambda samples: None)
            return time.perf_counter() - began
    finally:
        pipeline.close()


def _unit(folder: Path) -> Unit:
    return Unit(0, 0, list_inputs(LocalRaw(folder / "raw")))


def _decoding(config: TokenizeBench, jpegs: list[bytes], size: str) -> list[dict[str, Any]]:
    """Images per second and core, and the greatest difference in grey levels."""
    side = config.image_size

    def ours(data: bytes) -> NDArray[np.uint8]:
        return centre_square(decode_image(data), side).permute(1, 2, 0).numpy()

    def pillow(data: bytes) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))

    best = interleaved(
        {"ours": lambda: [ours(data) for data in jpegs], "pillow": lambda: [pillow(data) for data in jpegs]},
        config.rounds,
    )
    differences = [np.abs(ours(data).astype(int) - pillow(data)).max() for data in jpegs]
    speeds = {name: len(jpegs) / seconds for name, seconds in best.items()}
    return [
        row(
            f"tokenize/decode/{size}/vs-pillow/time",
            speeds["ours"],
            speeds["pillow"],
            "images/s",
            2.5,
            more_is_better=True,
        ),
        row(f"tokenize/decode/{size}/vs-1-grey-level", max(float(max(differences)), 1e-9), 1.0, "grey levels", 1.0),
    ]


def _bounds(config: TokenizeBench, folder: Path, size: str) -> Iterator[dict[str, Any]]:
    """The whole pipeline beside its slowest stage alone."""
    unit, count = _unit(folder), config.images
    quick = _Waiting(config.image_size, 0.0)
    recipe = _recipe(folder, config, quick)
    fetched = [item for chunk in read_chunks(recipe, unit) for item in chunk if isinstance(item, Fetched)]
    best = interleaved(
        {
            "decode alone": lambda: _decode_alone(fetched, recipe, config.threads),
            "pipeline": lambda: _run(folder, config, quick, unit),
        },
        config.rounds,
    )
    yield row(
        f"tokenize/decode-bound/{size}/vs-decoding-alone/time",
        count / best["pipeline"],
        count / best["decode alone"],
        "images/s",
        0.9,
        more_is_better=True,
    )
    wall = min(_timed(lambda: _decode_alone(fetched, recipe, config.threads)) for _ in range(config.rounds))
    batches = -(-count // config.encode_batch)
    slow = _Waiting(config.image_size, config.slowdown * wall / batches)
    whole = min(_run(folder, config, slow, unit) for _ in range(config.rounds))
    yield row(
        f"tokenize/encode-bound/{size}/vs-encoding-alone/time",
        count / whole,
        count / (batches * slow.seconds),
        "images/s",
        0.9,
        more_is_better=True,
    )


def _decode_alone(fetched: list[Fetched], recipe: Recipe, threads: int) -> None:
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        chunks = [fetched[at : at + 32] for at in range(0, len(fetched), 32)]
        for _ in pool.map(lambda chunk: [make_image(item, recipe) for item in chunk] and None, chunks):
            pass


def _on_the_device(config: TokenizeBench, folder: Path, size: str) -> dict[str, Any]:
    """A discrete VAE: the pipeline beside batches that already lie on the device."""
    with torch.random.fork_rng():
        network = DiscreteVAE(DiscreteVAEConfig(image_size=config.image_size, num_tokens=8192, hidden_dim=256))
    tokenizer = FrozenImageTokenizer(network, precision="bf16").to("cuda")
    shape = (config.encode_batch, 3, config.image_size, config.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    batches = -(-config.images // config.encode_batch)

    def alone() -> None:
        for _ in range(batches):
            tokenizer.encode(pixels)
        torch.cuda.synchronize()

    alone()
    bound = min(_timed(alone) for _ in range(config.rounds))
    unit = _unit(folder)
    whole = min(_run(folder, config, tokenizer, unit) for _ in range(config.rounds))
    return row(
        f"tokenize/dvae/{size}/bf16/vs-encoding-alone/time",
        config.images / whole,
        config.images / bound,
        "images/s",
        0.9,
        more_is_better=True,
    )


def _flat_memory(config: TokenizeBench, folder: Path) -> dict[str, Any]:
    """Memory after many small images beside that after a tenth of them."""
    values = np.random.default_rng(1)
    raw, per_shard = folder / "small" / "raw", min(1000, config.memory_images)
    data = [_jpeg(values.integers(0, 256, (32, 32, 3)).astype(np.uint8)) for _ in range(16)]
    write_shard(raw / "00000.tar", [RawRecord(f"{n:09d}", data[n % 16], "jpg", f"image {n}") for n in range(per_shard)])
    for number in range(1, config.memory_images // per_shard):
        (raw / f"{number:05d}.tar").hardlink_to(raw / "00000.tar")
    unit = _unit(folder / "small")
    seen: list[float] = []
    marks = [config.memory_images // 10, config.memory_images - config.encode_batch]
    done = 0

    def progress(samples: int) -> None:
        nonlocal done
        done += samples
        while len(seen) < len(marks) and done >= marks[len(seen)]:
            seen.append(resident_bytes())

    tokenizer = _Waiting(32, 0.0)
    recipe = _recipe(folder / "small", config, tokenizer)
    pipeline = Pipeline(recipe, threads=config.threads, queue=0, device=torch.device("cpu"), stop=lambda: False)
    try:
        with unit_writer(folder / "small" / "tokens", unit, "bench", {}, "bench") as writer:
            pipeline.run(unit, {"": writer}, progress)
    finally:
        pipeline.close()
    name = f"tokenize/memory-after/{config.memory_images / 1000:g}k/vs-a-tenth/memory"
    return row(name, seen[1], seen[0], "bytes", 0.95)


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
