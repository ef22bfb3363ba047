"""What an image tokenizer keeps of images that it does not train on, measured and shown while it trains."""

import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, model_validator
from torch import Tensor, nn

from tokscale.base.config import Config
from tokscale.base.errors import ConfigError
from tokscale.base.files import storage_errors
from tokscale.base.protocols import Engine
from tokscale.base.shapes import UInt8
from tokscale.data.loading import ImageLoader
from tokscale.dist.comm import Comm
from tokscale.evaluation.distances import LEAST_FOR_KID, kernel_distance
from tokscale.evaluation.features import Network, Seen, open_network, see
from tokscale.evaluation.quality import psnr, reconstructed, ssim
from tokscale.inference.grids import interleave, labelled_grid
from tokscale.stages.train_samples import FOLDER, LISTING, keep_line
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.image import TrainableConfig, codec_class
from tokscale.tokenizers.quantize.base import codebook_usage
from tokscale.train.hooks import Hook
from tokscale.train.metrics import MetricsWriter

_SHOWN = 16
Images = UInt8[Tensor, "batch channels height width"]


class ReconstructionsConfig(Config):
    """How often to look at reconstructions of held-out images while a tokenizer trains."""

    every_steps: int = Field(default=500, ge=0)
    """Steps between looks; the last step is always looked at. 0 never looks."""
    images: int = Field(default=64, ge=1)
    """Held-out images, the first ones."""
    features: str | None = None
    """The network that looks at them for `reconstruction/rkid` and its error: `efficientnet_lite0` (extra `evaluate`),
    or the path of a TorchScript program, which `allow_torchscript=true` trusts. Needs 40 images; 500 tell more."""

    @model_validator(mode="after")
    def _enough(self) -> "ReconstructionsConfig":
        if self.features is not None and self.images < LEAST_FOR_KID:
            raise ValueError(f"images={self.images}: an rKID needs {LEAST_FOR_KID}; raise it, or leave features out")
        return self


class Reconstructions(Hook):
    """`reconstruction/psnr`, `ssim`, `rkid`, `codes_used`, and a sheet of images beside what was made of them.

    The main rank measures, with a copy of the weights; the others wait.
    """

    def __init__(
        self,
        config: ReconstructionsConfig,
        tokenizer: TrainableConfig,
        engine: Engine,
        held_out: ImageLoader,
        comm: Comm,
        *,
        total_steps: int,
        run_dir: Path,
    ):
        """Measure on the first images of `held_out`."""
        self._config, self._tokenizer, self._engine, self._loader = config, tokenizer, engine, held_out
        self._comm, self._total, self._folder = comm, total_steps, run_dir / FOLDER
        self._writer: MetricsWriter | None = None
        self._images: Images | None = None
        self._network: Network | None = None
        self._real: Seen | None = None
        if config.features is not None:
            if held_out.samples < LEAST_FOR_KID:
                raise ConfigError(
                    f"reconstructions.features: {held_out.samples} images are held out, and an rKID needs "
                    f"{LEAST_FOR_KID}; raise data.held_out.share, or leave it out"
                )
            with comm.raise_together(f"opening {config.features}"):
                if comm.is_main:
                    self._network = open_network(config.features, comm.device)

    def on_begin(self, step: int, writer: MetricsWriter | None) -> None:
        """Take the writer, whose trackers show images."""
        del step
        self._writer = writer

    def measures(self, step: int) -> bool:
        """Every so many steps, and the last one."""
        return step % self._config.every_steps == 0 or step == self._total

    def measure(self, step: int) -> Mapping[str, float]:
        """See the class; the same numbers on every rank."""
        began, found = time.perf_counter(), dict[str, float]()
        with self._engine.gathered() as model:
            found = self._comm.on_main("reconstructing held-out images", lambda: self._look(step, self._frozen(model)))
        found |= {"seconds": time.perf_counter() - began}
        found["seconds"] = self._comm.max(found["seconds"])
        return {f"reconstruction/{name}": value for name, value in found.items()}

    def _frozen(self, model: nn.Module) -> FrozenImageTokenizer:
        kind = codec_class(self._tokenizer)
        codec = kind(kind.published(self._tokenizer))
        codec.load_state_dict({name: value.detach().float().clone() for name, value in model.state_dict().items()})
        return FrozenImageTokenizer(codec.to(self._comm.device))

    def _look(self, step: int, tokenizer: FrozenImageTokenizer) -> dict[str, float]:
        if self._images is None:
            self._images = self._loader.prepare(0, min(self._config.images, self._loader.samples)).pixels
        images = self._images
        codes, rebuilt = reconstructed(tokenizer, images)
        sheet = labelled_grid(
            interleave(images[:_SHOWN], rebuilt[:_SHOWN]),
            ["image", "rebuilt"] * len(images[:_SHOWN]),
            columns=8,
            side=96,
        )
        path = self._folder / f"step_{step:09d}.png"
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            keep_line(path.parent / LISTING, {"step": step, "file": path.name, "prompts": [], "seeds": []})
        if self._writer is not None:
            self._writer.trackers.image(step, "reconstructions", sheet)
        used = codebook_usage(codes, tokenizer.num_tokens)["codebook_used"].item() * tokenizer.num_tokens
        found = {"psnr": psnr(images, rebuilt), "ssim": ssim(images, rebuilt), "codes_used": float(round(used))}
        return found | (self._rkid(self._network, images, rebuilt) if self._network is not None else {})

    def _rkid(self, network: Network, images: Images, rebuilt: Images) -> dict[str, float]:
        if self._real is None:
            self._real = see(network, images)
        distance = kernel_distance(self._real.features, see(network, rebuilt).features)
        return {"rkid": distance.value, "rkid_error": distance.error}
