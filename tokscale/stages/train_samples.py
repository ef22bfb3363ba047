"""Images drawn while a model trains: the same prompts and seeds each time, so that one sees it learn."""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from pydantic import Field
from torch import Tensor

from tokscale.base import rng
from tokscale.base.batch import SOFT_TARGETS, TokenBatch
from tokscale.base.config import Config, decode, kind_of
from tokscale.base.errors import ConfigError
from tokscale.base.files import read_regular, storage_errors
from tokscale.base.log import logger
from tokscale.base.protocols import Engine
from tokscale.base.rng import seed_of
from tokscale.data.loading import TokenLoader
from tokscale.dist.comm import Comm
from tokscale.inference.grids import labelled_grid
from tokscale.inference.pretrained import Pretrained, Prompts
from tokscale.models.model import GenerativeModel
from tokscale.models.registry import model_class
from tokscale.runs.stage import StageConfig
from tokscale.stages.inputs import Inputs
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.train.hooks import Hook
from tokscale.train.metrics import MetricsWriter

FOLDER, LISTING = "samples", "training.jsonl"
"""In the run folder; the listing has a line for each time: `step`, `file`, `prompts`, `seeds`, `seconds`."""
log = logger("train")


class SamplesConfig(Config):
    """What is drawn while a model trains, and how often."""

    every_steps: int = Field(default=1000, ge=0)
    """Steps between drawings; 0 draws none."""
    prompts: tuple[str, ...] = ()
    """What to draw; by default what the first samples of `data.held_out` were told, and nothing where none is."""
    count: int = Field(default=8, ge=1)
    """Images, where the prompts are those of held-out samples."""
    weights: str = "raw"
    """`raw`, or an average such as `ema/0.999`."""
    gather: Literal["auto", "whole", "sharded"] = "auto"
    """How the weights that an engine shards come to a rank that draws. `whole`: all at once, and nothing is drawn where
    there is no room for them. `sharded`: those of one module at a time, in each of the model's looks at an image;
    slower, and for models that draw all codes of an image together: MaskGIT, of super-resolution too. `auto`: whole
    where there is room, else sharded where the model can. The images are the same."""
    sampling: dict[str, Any] = {}
    """Options of the model's own sampling configuration: `temperature`, `cond_scale`, ..."""
    max_seconds: float = Field(default=60.0, gt=0)
    """Longest that drawing may take: what takes longer is said, and not tried again in this process."""


@dataclass(frozen=True)
class _Asked:
    """What to draw on this rank."""

    prompts: Prompts
    labels: list[str]
    """For people, of all ranks' images."""
    seeds: list[int]
    mine: list[int]
    """Numbers of this rank's images among all."""
    shown: bool
    """False where this rank draws another's image, only to make as many calls as the others."""


def samples_hook(
    config: StageConfig, options: SamplesConfig, inputs: Inputs, engine: Engine, comm: Comm
) -> "Samples | None":
    """The hook that draws; None for a model that draws nothing, or where nobody said what.

    Raises:
        ConfigError: When an option of `samples.sampling` is unknown or out of range, or the model cannot be drawn from
            as `samples.gather` says.
    """
    kind = model_class(inputs.model)
    if not issubclass(kind, GenerativeModel) or inputs.image is None:
        return None
    if not options.prompts and not (inputs.held_out and isinstance(inputs.held_out[0], TokenLoader)):
        return None
    if options.gather == "sharded" and not kind.parallel_decoding:
        raise ConfigError(
            f"samples.gather=sharded: {_too_many_calls(inputs)}; leave the key out, or set samples.every_steps=0 and "
            "draw from an export"
        )
    sampling = decode(kind.sampling_config, options.sampling, where="samples.sampling")
    return Samples(config, options, sampling, inputs, engine, comm)


def _too_many_calls(inputs: Inputs) -> str:
    return f"model.kind={kind_of(inputs.model)} draws code after code, and would gather every layer anew for each"


class Samples(Hook):
    """Draws on every rank its part of the images, with whole weights or module by module: see `SamplesConfig.gather`.

    What can be done in neither way is said in a line, and nothing is drawn.
    """

    def __init__(
        self,
        config: StageConfig,
        options: SamplesConfig,
        sampling: Config,
        inputs: Inputs,
        engine: Engine,
        comm: Comm,
    ):
        """Draw for `inputs`, whose image tokenizer makes images of the codes."""
        self._config, self._options, self._sampling, self._inputs = config, options, sampling, inputs
        self._engine, self._comm = engine, comm
        self._image: FrozenImageTokenizer | None = None
        self._writer: MetricsWriter | None = None
        self._asked: _Asked | None = None
        self._by_module = options.gather == "sharded" and engine.bytes_to_gather() > 0
        self._tried = self._given_up = False

    def on_begin(self, step: int, writer: MetricsWriter | None) -> None:
        """Take the writer, whose trackers show images."""
        del step
        self._writer = writer

    def measures(self, step: int) -> bool:
        """Every so many steps."""
        return step % self._options.every_steps == 0 and not self._given_up

    def measure(self, step: int) -> Mapping[str, float]:
        """Draw, and say how long that took: `samples/seconds`."""
        if not self._tried and not self._possible():
            return {}
        began = time.perf_counter()
        with self._comm.raise_together("reading what to draw"):
            asked = self._part()
        averaged = nullcontext() if self._options.weights == "raw" else self._engine.averaged(self._options.weights)
        gathered = self._engine.gathered(by_module=self._by_module)
        with averaged, gathered as model, rng.scope(self._config.seed, "samples"):
            if not self._tried and not self._quick(model, asked):
                return {}
            codes = self._draw(model, asked)
        seconds = self._comm.max(time.perf_counter() - began)
        parts = self._comm.gather_to_main((asked.mine, codes) if asked.shown else ([], None))
        self._comm.on_main("showing samples", lambda: self._show(step, parts or [], seconds))
        if seconds > self._options.max_seconds:
            self._give_up(f"drawing takes {seconds:.0f} s, longer than samples.max_seconds={self._limit}")
        self._tried = True
        return {"samples/seconds": seconds}

    @property
    def _limit(self) -> str:
        return f"{self._options.max_seconds:g}"

    def _give_up(self, why: str) -> None:
        self._given_up = True
        if self._comm.is_main:
            log.warning("no more samples while it trains: %s", why)

    def _possible(self) -> bool:
        """Whether there is a way to draw, which is then chosen; the same on every rank."""
        needed = self._engine.bytes_to_gather()
        if self._by_module or self._fits(needed):
            return True
        kind = model_class(self._inputs.model)
        why = f"the whole weights ({needed / 2**30:.1f} GiB) do not fit on a rank beside the training"
        if self._options.gather == "whole":
            self._give_up(f"{why}, and samples.gather asks for nothing else")
        elif not (issubclass(kind, GenerativeModel) and kind.parallel_decoding):
            self._give_up(f"{why}, and {_too_many_calls(self._inputs)}")
        else:
            self._by_module = True
            if self._comm.is_main:
                log.info("samples are drawn module by module: %s", why)
        return self._by_module

    def _fits(self, needed: int) -> bool:
        """Whether every rank has room for so many bytes."""
        device = self._comm.device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = psutil.virtual_memory().available // max(self._comm.world, 1)
        return not self._comm.max(float(needed > 0.8 * free))

    def _quick(self, model: Any, asked: _Asked) -> bool:
        """Draw a single image first: whoever asked for too much learns it in the time of one."""
        began = time.perf_counter()
        self._draw(model, asked, only_first=True)
        seconds = self._comm.max(time.perf_counter() - began)
        if seconds > self._options.max_seconds:
            self._give_up(f"one image takes {seconds:.0f} s, longer than samples.max_seconds={self._limit}")
        return not self._given_up

    def _draw(self, model: Any, asked: _Asked, *, only_first: bool = False) -> Tensor | None:
        """This rank's codes, if it has any to draw. Collective.

        Where the weights are gathered module by module, a rank that fails in the midst leaves the others in a
        collective, as in a step of training; they end when it does.
        """
        together = nullcontext() if self._by_module else self._comm.raise_together("drawing samples")
        with together:
            return self._codes(model, asked, slice(1 if only_first else None))

    def _codes(self, model: Any, asked: _Asked, mine: slice) -> Tensor | None:
        text, mask, extra = asked.prompts
        if not len(text):
            return None
        codes = model.generate_codes(
            text[mine],
            mask[mine],
            options=self._sampling,
            seeds=[asked.seeds[number] for number in asked.mine][mine],
            extra={name: value[mine] for name, value in extra.items()},
        )
        return codes.cpu()

    def _part(self) -> _Asked:
        """What this rank draws; read once."""
        if self._asked is None:
            self._asked = self._of_prompts() if self._options.prompts else self._of_held_out()
        return self._asked

    def _of_prompts(self) -> _Asked:
        prompts, inputs = list(self._options.prompts), self._inputs
        mine, shown = self._share(len(prompts))
        states = inputs.states.encoder if inputs.states else None
        told = Pretrained(
            folder=self._config.run_dir,
            config=inputs.model,
            model=self._engine.model,  # pyright: ignore[reportArgumentType] - only its text_seq_len is read
            image_tokenizer=self._image,  # pyright: ignore[reportArgumentType] - captions need none
            text_tokenizer=inputs.text,
            device=self._comm.device,
            text_encoder=states,
        ).prompts_with_negative([prompts[number] for number in mine], self._sampling)
        return _Asked(told, prompts, self._seeds(prompts), mine, shown)

    def _share(self, count: int) -> tuple[list[int], bool]:
        """Numbers of the images that this rank draws, and whether they are its own."""
        mine = list(range(count))[self._comm.rank :: self._comm.world]
        return (mine, True) if mine or not self._by_module else ([0], False)

    def _of_held_out(self) -> _Asked:
        loader = self._inputs.held_out[0]  # of several shapes of images, captions of the first
        assert isinstance(loader, TokenLoader)
        count = min(self._options.count, loader.samples)
        prepared = loader.prepare(0, count)
        batch: TokenBatch = loader.deliver(prepared).to(self._comm.device)
        labels = [caption or key for caption, key in zip(prepared.stored.captions, batch.keys, strict=True)]
        mine, shown = self._share(count)
        extra = {name: value[mine] for name, value in batch.extra.items() if name != SOFT_TARGETS}
        prompts = Prompts(batch.text[mine], batch.text_mask[mine], extra)
        return _Asked(prompts, labels, self._seeds(labels), mine, shown)

    def _seeds(self, labels: list[str]) -> list[int]:
        return [seed_of(self._config.seed, "samples", label, number) for number, label in enumerate(labels)]

    def _show(self, step: int, parts: list[tuple[list[int], Tensor | None]], seconds: float) -> None:
        """Write the sheet, a line of the listing, and TensorBoard's image. By the main rank."""
        asked = self._part()
        places = [number for mine, codes in parts if codes is not None for number in mine]
        drawn = torch.cat([codes for _, codes in parts if codes is not None])[torch.tensor(places).argsort()]
        tokenizer = self._tokenizer()
        sheet = labelled_grid(tokenizer.decode(drawn.reshape(-1, *tokenizer.code_shape)).cpu(), asked.labels)
        path = self._config.run_dir / FOLDER / f"step_{step:09d}.png"
        row = {"step": step, "file": path.name, "prompts": asked.labels, "seeds": asked.seeds, "seconds": seconds}
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            keep_line(path.parent / LISTING, row)
        if self._writer is not None:
            self._writer.trackers.image(step, "samples", sheet)

    def _tokenizer(self) -> FrozenImageTokenizer:
        facts = self._inputs.image
        assert facts is not None
        if self._image is None:
            opened = load_image_tokenizer(self._config.image_tokenizer_folder, device=self._comm.device)
            self._image = opened.matching(facts.fingerprint, facts.code_shape)
        return self._image


def keep_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to a listing by steps; lines of this step and later ones, of an earlier life of the run, go."""
    lines = read_regular(path).decode(errors="replace").splitlines() if path.exists() else []
    kept = [line for line in lines if _step(line) < row["step"]]
    path.write_text("\n".join([*kept, json.dumps(row)]) + "\n")


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return 2**62
