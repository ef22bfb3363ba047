"""Named randomness: every draw says what it is for, so that resuming needs no saved generator state.

Three kinds. `generator` for code that takes a `torch.Generator`; `scope` for library code that reads torch's default
generators (dropout, gumbel noise); `uniform_at` for one number per sample that depends only on the sample's place
in the data set, and so on neither the number of ranks nor the micro-batch size.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tokscale.base.shapes import Float, Int, Shaped


def seed_of(seed: int, *names: str | int) -> int:
    """A 63-bit seed from a base seed and a path of names, e.g. `seed_of(seed, "dropout", step, rank)`."""
    text = "/".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for the stream `names`."""
    return torch.Generator(device).manual_seed(seed_of(seed, *names))


@contextmanager
def scope(seed: int, *names: str | int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, torch's default generators of the CPU and `device` follow the stream `names`; restored after."""
    device = torch.device(device)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.default_generator.manual_seed(seed_of(seed, *names))
        if devices:
            torch.get_device_module(device).manual_seed(seed_of(seed, *names))
        yield


def mix64(values: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The splitmix64 finaliser on int64: a bijection whose bits look random. The data order fixes it for ever."""
    z = values + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def uniform_at(positions: Int[Tensor, "batch"], seed: int, *names: str | int) -> Float[Tensor, "batch"]:
    """One float64 number in [0, 1) per sample, a pure function of the sample's position and the stream name."""
    bits = mix64(positions.to(torch.int64) ^ _signed(seed_of(seed, *names)))
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def uniforms_at(positions: Int[Tensor, "batch"], count: int, seed: int, *names: str | int) -> Float[Tensor, "batch n"]:
    """`count` float64 numbers in (0, 1) per sample, a pure function of its position, their index and the stream."""
    streams = mix64(positions.to(torch.int64) ^ _signed(seed_of(seed, *names)))
    return uniforms(streams, torch.arange(count, device=positions.device))


def uniforms(streams: Int[Tensor, "*rows"], places: Int[Tensor, "..."]) -> Float[Tensor, "*rows places"]:
    """A float64 number in (0, 1) for each place of each stream; never 0, so that its logarithm is finite.

    Args:
        streams: Numbers as `mix64` or `seed_of` give them.
        places: Indices within a stream along the last axis, broadcast against the streams.
    """
    bits = _shift_right(mix64(mix64(streams)[..., None] ^ places), 11)
    return (bits.to(torch.float64) + 0.5) * 2.0**-53


def _shift_right(values: Shaped[Tensor, "*shape"], by: int) -> Shaped[Tensor, "*shape"]:
    """Logical shift: torch's `>>` on int64 copies the sign bit."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
