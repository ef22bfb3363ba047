"""Any tokenizer that ships as a pair of TorchScript programs, such as NVIDIA's Cosmos."""

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import PositiveInt

from tokscale.base.config import Config
from tokscale.base.errors import CheckpointError, DataError
from tokscale.base.files import atomic_write, sha256_file
from tokscale.base.shapes import Float, Int, Tensor
from tokscale.base.trust import require_torchscript
from tokscale.tokenizers.codec import ImageCodec

PARTS = ("encoder.jit", "decoder.jit")
_WAY_OUT = f"put {PARTS[0]} and {PARTS[1]} there, such as those of a nvidia/Cosmos-Tokenizer-DI model"


class TorchScriptConfig(Config):
    """What the programs do not say of themselves."""

    kind: Literal["torchscript"] = "torchscript"
    image_size: PositiveInt = 256
    """Side of the square images in pixels."""
    reduction: PositiveInt = 16
    """Pixels per code along a side: 8 for Cosmos-DI8x8, 16 for Cosmos-DI16x16."""
    num_tokens: PositiveInt = 64000
    """Entries of the codebook. Cosmos documents its ids as 1 to 64000; its programs give 0 to 63999."""
    input_range: Literal["-1_1", "0_1"] = "-1_1"
    """Values of images that the programs take and give."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights inside, and so of the images they take."""


class TorchScriptTokenizer(ImageCodec):
    """Wraps the programs. They quantize themselves, in whatever precision they were written with.

    TorchScript can read and write files (`aten::save`, `aten::from_file`) and can hang: it is a program, and loaded
    only where `allow_torchscript` says so.
    """

    config_class = TorchScriptConfig
    version: ClassVar[str] = "torchscript/1"

    def __init__(self, config: TorchScriptConfig, programs: tuple[Path, Path]):
        """Load both programs.

        Raises:
            CheckpointError: When a file is missing or no TorchScript program.
        """
        super().__init__()
        self.config: TorchScriptConfig = config
        self.num_tokens = config.num_tokens
        self.image_size = config.image_size
        self.channels = 3
        self.code_shape = (config.image_size // config.reduction,) * 2
        self._files = programs
        self.encoder, self.decoder = (load_program(path, _WAY_OUT) for path in programs)

    def fingerprint_fields(self) -> dict[str, Any]:
        """See `ImageCodec.fingerprint_fields`."""
        return {"image_size": self.image_size, "input_range": self.config.input_range, "dtype": self.config.dtype}

    def features(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 grid_h grid_w"]:
        """The ids themselves, as exact fp32 numbers: the program quantizes.

        Raises:
            DataError: When the program gives ids of another shape or outside the vocabulary.
        """
        pixels = 2 * pixels - 1 if self.config.input_range == "-1_1" else pixels
        with torch.autocast(pixels.device.type, enabled=False):
            found = self.encoder(pixels.to(getattr(torch, self.config.dtype)))
        ids = found if isinstance(found, Tensor) else found[0]
        if ids.is_floating_point() or tuple(ids.shape[1:]) != self.code_shape:
            raise DataError(
                f"{self._files[0]} gives {ids.dtype} of shape {tuple(ids.shape[1:])}, not ids of {self.code_shape}; "
                "set image_size and reduction to the program's"
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.num_tokens:
            raise DataError(
                f"{self._files[0]} gives ids from {int(ids.min())} to {int(ids.max())}, outside num_tokens="
                f"{self.num_tokens}"
            )
        return ids.to(torch.float32)[:, None]

    def quantize(self, features: Float[Tensor, "batch 1 grid_h grid_w"]) -> Int[Tensor, "batch grid_h grid_w"]:
        """Back to integers."""
        return features[:, 0].to(torch.int64)

    def decode_to_unit_range(
        self, codes: Int[Tensor, "batch grid_h grid_w"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [0, 1] of ids."""
        with torch.autocast(codes.device.type, enabled=False):
            pixels = self.decoder(codes).float()
        return (pixels + 1) / 2 if self.config.input_range == "-1_1" else pixels

    def content_sha256(self) -> str:
        """Hash of the program files."""
        return hashlib.sha256("".join(sha256_file(path) for path in self._files).encode()).hexdigest()

    def save_weights(self, folder: Path) -> None:
        """Copy the programs."""
        for path, name in zip(self._files, PARTS, strict=True):
            if path.resolve() != (folder / name).resolve():
                content = path.read_bytes()
                with atomic_write(folder / name) as file:
                    file.write(content)

    @classmethod
    def from_folder(cls, config: TorchScriptConfig, folder: Path) -> Self:
        """The pair in `folder`.

        Raises:
            CheckpointError: When a file is missing or no TorchScript program.
        """
        return cls(config, (folder / PARTS[0], folder / PARTS[1]))

    @classmethod
    def from_original(cls, config: TorchScriptConfig, source: Path | str) -> Self:
        """The pair as it was published: the same files.

        Raises:
            CheckpointError: When a file is missing or no TorchScript program.
        """
        return cls.from_folder(config, Path(source))


def load_program(
    path: Path, way_out: str = "give the path of a TorchScript program; nothing is fetched at run time"
) -> torch.jit.ScriptModule:
    """A TorchScript program, on the CPU.

    Raises:
        ConfigError: Unless the user allowed programs; see `base.trust`.
        CheckpointError: When there is none, or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {way_out}")
    require_torchscript(path)
    try:
        return torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not a TorchScript program ({str(error).splitlines()[0]})") from error
