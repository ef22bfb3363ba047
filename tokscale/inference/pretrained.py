"""A trained model from an export folder, ready to sample: no engine, no launcher, no Hydra."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from PIL import Image

from tokscale.base import trust
from tokscale.base.batch import LABELS, TEXT_EMBEDS, TEXT_EMBEDS_MASK, TokenBatch
from tokscale.base.config import Config, decode, did_you_mean, kind_of
from tokscale.base.errors import CheckpointError, ConfigError, DataError
from tokscale.base.files import read_json_texts
from tokscale.base.protocols import ImageTokenizer, TextEncoder, TextTokenizer
from tokscale.base.shapes import Bool, Int, Tensor, UInt8
from tokscale.checkpoint.hub import HubMixin
from tokscale.checkpoint.weights import load_weights, read_config, require_fit
from tokscale.evaluation.measures import Shape
from tokscale.inference.asked import asked, finished
from tokscale.inference.saving import save_again
from tokscale.inference.text_encoder import COPY, RECORD, exported_encoder
from tokscale.models.common import condition_of, reads_captions
from tokscale.models.model import GenerativeModel
from tokscale.models.registry import ModelConfig, build_model
from tokscale.nn.strides import transpose_weights_for_decoding
from tokscale.tokenizers.codec import FrozenImageTokenizer, shown_size
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.text import load_text_tokenizer
from tokscale.tokenizers.text.base import AnyTextTokenizer
from tokscale.tokenizers.text.cut import CutCaptions
from tokscale.tokenizers.text.encoder import FrozenTextEncoder


class Prompts(NamedTuple):
    """Captions as a model is told them."""

    text: Int[Tensor, "batch text"]
    """Caption ids; none for a model that reads none."""
    text_mask: Bool[Tensor, "batch text"]
    extra: dict[str, Tensor]
    """As in a `TokenBatch`: states of the text encoder, or classes."""


@dataclass(frozen=True, repr=False)
class Pretrained(HubMixin):
    """What an export holds."""

    folder: Path
    config: Config
    model: GenerativeModel
    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer | None
    """None for a model that reads no caption ids."""
    device: torch.device
    text_encoder: TextEncoder | None = None
    """For a model that is told the states of one."""
    size: str | None = None
    """Width x height of the images that are drawn where no other is asked for, of a model of several; see `of_size`."""

    def __repr__(self) -> str:
        """What it is and where it came from, on one line; the network is `model`."""
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        size, kind = self.image_tokenizer.image_size, kind_of(self.config)
        sizes = size if len(self.tokenizers) == 1 else ", ".join(self.tokenizers)
        return f"Pretrained({kind}, {millions:.1f}M parameters, {sizes} pixels, {str(self.folder)!r}, {self.device})"

    @cached_property
    def tokenizers(self) -> Mapping[str, ImageTokenizer]:
        """The image tokenizer for each size that the model draws, by width x height; the first is the default."""
        found, first = {}, self.image_tokenizer
        grids = _grids(self.config)
        for grid in grids if len(grids) > 1 else ():
            rows, columns = (
                side * cells // own for side, cells, own in zip(first.image_hw, grid, first.code_shape[:2], strict=True)
            )
            assert isinstance(first, FrozenImageTokenizer)
            found[shown_size((rows, columns))] = first.resized((rows, columns))
        return found or {shown_size(first.image_hw): first}

    def tokenizer(self, size: str | None) -> ImageTokenizer:
        """The image tokenizer for a size of images, width x height as in `320x192`; the model's first when left out.

        Raises:
            ConfigError: When the model was not trained on images of that size.
        """
        wanted = size or self.size
        if wanted is None:
            return next(iter(self.tokenizers.values()))
        if wanted not in self.tokenizers:
            sizes = ", ".join(self.tokenizers)
            raise ConfigError(f"size: got {wanted!r}; this model draws images of {sizes}, those it was trained on")
        return self.tokenizers[wanted]

    def of_size(self, size: str) -> "Pretrained":
        """The same model, to draw and to measure images of one of its sizes, width x height.

        Raises:
            ConfigError: When the model was not trained on images of that size.
        """
        return replace(self, image_tokenizer=self.tokenizer(size), size=size)

    @property
    def shape(self) -> "int | Shape":
        """What it reads and draws, for real images to be cut to: the side of a square, or one shape among several."""
        if len(self.tokenizers) == 1:
            return self.image_tokenizer.image_size
        return Shape(self.tokenizer(None).image_hw, tuple(each.image_hw for each in self.tokenizers.values()))

    def prompts(self, captions: Sequence[str]) -> Prompts:
        """Captions as the model is told them, on its device. Classes are given as numbers: `["7", "281"]`.

        Raises:
            DataError: When a class is no number, or not one of the model's.
        """
        none = torch.zeros(len(captions), 0, dtype=torch.int64, device=self.device)
        text, mask, extra = none, none.bool(), {}
        if self.text_tokenizer is not None:
            text, mask = self.text_tokenizer.encode(captions, self.model.text_seq_len)
        if self.text_encoder is not None:
            extra[TEXT_EMBEDS], extra[TEXT_EMBEDS_MASK] = self.text_encoder.encode(captions)
        condition: Any = condition_of(self.config)
        if condition.reads_labels:
            extra[LABELS] = _classes(captions, condition.num_classes, self.class_names)
        to = lambda tensor: tensor.to(self.device)  # noqa: E731
        return Prompts(to(text), to(mask), {name: to(tensor) for name, tensor in extra.items()})

    @cached_property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, where the data had any; they are understood as prompts."""
        path = self.folder / "classes.json"
        return tuple(read_json_texts(path)) if path.is_file() else ()

    def cut_captions(self) -> list[str]:
        """What of the prompts since the last question did not fit, for a person."""
        parts = {"The model's text_seq_len": self.text_tokenizer, "The encoder's length": self.text_encoder}
        found = []
        for key, part in parts.items():
            if isinstance(part, AnyTextTokenizer | FrozenTextEncoder):
                found.append(part.cut.words(key))
                part.cut = CutCaptions()
        return [words for words in found if words is not None]

    def prompts_with_negative(self, captions: Sequence[str], sampling: Config) -> Prompts:
        """`prompts`, with what to be guided away from where `sampling` names a `negative_prompt`."""
        found = self.prompts(captions)
        against = getattr(sampling, "negative_prompt", None)
        if against is not None:
            other = self.prompts([against] * len(captions))
            entries = {"text": other.text, "text_mask": other.text_mask, **other.extra}
            found.extra.update({f"negative.{name}": tensor for name, tensor in entries.items()})
        return found

    @overload
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        size: str | None = None,
        output: Literal["tensor"] = "tensor",
        **options: Any,
    ) -> UInt8[Tensor, "prompts channels height width"]: ...

    @overload
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        size: str | None = None,
        output: Literal["pil"],
        **options: Any,
    ) -> list[Image.Image]: ...

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        size: str | None = None,
        output: Literal["tensor", "pil"] = "tensor",
        **options: Any,
    ) -> UInt8[Tensor, "prompts channels height width"] | list[Image.Image]:
        """Draw one image for each prompt; `stream` gives them batch by batch.

        Args:
            prompts: Captions, or one; of a model that is told classes, their numbers.
            seed: Base of the per-image seeds when those are not given; prompt `i` then draws from its own stream.
            seeds: One seed an image: the same prompt and seed draw the same noise in any batch.
            batch_size: Images sampled together.
            size: Width x height as in `320x192`, of a model that was trained on several; see `tokenizers`.
            output: Bytes in one tensor, or a list of Pillow images.
            options: Fields of the model's sampling configuration, e.g. `temperature=0.9, cond_scale=3`.

        Raises:
            ConfigError: When there is nothing to draw, or an option is unknown or out of range.
        """
        batches = self.stream(prompts, seed=seed, seeds=seeds, batch_size=batch_size, size=size, **options)
        return finished(torch.cat(list(batches)), output)

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        size: str | None = None,
        **options: Any,
    ) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """The images of `sample`, on the CPU, each batch as soon as it is drawn; memory holds one batch."""
        sampling = decode(self.model.sampling_config, options, where="sampling")
        tokenizer = self.tokenizer(size)
        draw: Callable[..., Tensor] = self.model.generate_codes
        if len(self.tokenizers) > 1:
            draw = partial(draw, grid=tuple(tokenizer.code_shape[:2]))
        for captions, drawn_from in asked(prompts, seed=seed, seeds=seeds, batch_size=batch_size):
            text, mask, extra = self.prompts_with_negative(captions, sampling)
            codes = draw(text, mask, options=sampling, seeds=drawn_from, extra=extra)
            # A model of levels gives an axis for them to a tokenizer without any, too.
            yield tokenizer.decode(codes.reshape(len(codes), *tokenizer.code_shape)).cpu()

    def batches(
        self,
        captions: Sequence[str],
        images: UInt8[Tensor, "batch channels height width"],
        batch_size: int,
        *,
        keep_condition: bool = True,
    ) -> Iterator[TokenBatch]:
        """Images with their captions as the model reads them in training.

        Args:
            captions: One for each image.
            images: Of a size that the model draws.
            batch_size: Images at once.
            keep_condition: False hides the captions, which is what guidance compares with.
        """
        shape = tuple(images.shape[2:])
        tokenizer = next((each for each in self.tokenizers.values() if each.image_hw == shape), self.image_tokenizer)
        for at in range(0, len(captions), batch_size):
            part = slice(at, at + batch_size)
            text, mask, extra = self.prompts(captions[part])
            if not keep_condition:
                mask = torch.zeros_like(mask)
                extra |= {name: torch.zeros_like(extra[name]) for name in (TEXT_EMBEDS_MASK,) if name in extra}
            codes = tokenizer.encode(images[part].to(self.device))
            yield TokenBatch(torch.arange(len(text)), text, mask, codes, extra=extra).to(self.device)

    def _save_pretrained(self, save_directory: Path, *, max_shard_size: int) -> None:
        save_again(
            save_directory,
            config=self.config,
            model=self.model,
            source=self.folder,
            beside=("image_tokenizer", "text_tokenizer", COPY, RECORD, "README.md"),
            max_shard_size=max_shard_size,
        )

    @classmethod
    def _from_pretrained(cls, folder: Path, **options: Any) -> "Pretrained":
        return load_pretrained(folder, **options)


def load_pretrained(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    text_encoder: TextEncoder | Path | str | None = None,
    allow_torchscript: bool = False,
) -> Pretrained:
    """Load an export.

    Args:
        folder: Written by `tokscale export`: config, weights and both tokenizers.
        device: Where to put the model and the image tokenizer.
        dtype: Of the model's weights; by default as stored.
        text_encoder: The frozen text encoder or its folder, for a model that is told its states, when it is not where
            the export says. Other models ignore it.
        allow_torchscript: Load an image tokenizer that is a TorchScript program.

    Raises:
        ConfigError: When its image tokenizer is a TorchScript program, which was not allowed.
        DataError: When the text encoder is not there, or is not the one the model was trained with.
        CheckpointError: When a file is missing or does not fit the configuration.
    """
    folder, device = Path(folder), torch.device(device)
    config = decode(ModelConfig, read_config(folder), where=str(folder / "config.json"), refuse=CheckpointError)
    require_fit(lambda: build_model(config), folder)
    with trust.allow_torchscript(allow_torchscript):
        image_tokenizer = load_image_tokenizer(folder / "image_tokenizer", device=device)
    grids = _grids(config)
    if grids and tuple(image_tokenizer.code_shape[:2]) not in grids:
        raise CheckpointError(
            f"{folder}: config.json states a grid of {' or '.join(map(str, grids))}, its image tokenizer one of "
            f"{image_tokenizer.code_shape}"
        )
    model = build_model(config)
    if not isinstance(model, GenerativeModel):
        raise ConfigError(f"{folder}: holds a model of kind {kind_of(config)!r}, which draws no images")
    encoder = exported_encoder(folder, config, text_encoder, device)
    load_weights(model, folder, as_stored=dtype is None)
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    transpose_weights_for_decoding(model)
    # One that is told nothing has a text tokenizer only where an older export brought it along.
    told_nothing = getattr(config, "condition", config) is None
    reads_ids = reads_captions(config) or (told_nothing and (folder / "text_tokenizer").exists())
    return Pretrained(
        folder=folder,
        config=config,
        model=model,
        image_tokenizer=image_tokenizer,
        text_tokenizer=load_text_tokenizer(folder / "text_tokenizer") if reads_ids else None,
        device=device,
        text_encoder=encoder,
    )


def _grids(config: Any) -> tuple[tuple[int, int], ...]:
    """Of the codes that a model draws, where its configuration says so."""
    one = getattr(config, "image_grid", None)
    return tuple(map(tuple, getattr(config, "image_grids", ()))) or (() if one is None else (tuple(one),))


def _classes(prompts: Sequence[str], num_classes: int, names: Sequence[str]) -> Int[Tensor, " batch"]:
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for prompt in map(str.strip, prompts):
        number = numbers.get(prompt, int(prompt) if prompt.isdecimal() else num_classes)
        if number >= num_classes:
            known = did_you_mean(prompt, names) if names else ""
            raise DataError(
                f"prompts: got {prompt!r}; this model draws classes, give a number below {num_classes}{known}"
            )
        found.append(number)
    return torch.tensor(found, dtype=torch.int64)
