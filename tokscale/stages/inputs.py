"""What a model trains on: token shards, or raw images with captions where it reads images themselves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from tokscale.base.config import kind_of
from tokscale.base.errors import ConfigError
from tokscale.base.files import write_json
from tokscale.base.kinds import for_each
from tokscale.base.log import logger
from tokscale.base.protocols import ImageTokenizer, TextTokenizer
from tokscale.data.loading import ImageLoader, ImageLoaderConfig, TokenLoader, TokenLoaderConfig, open_sources
from tokscale.data.loading.held_out import Split
from tokscale.data.loading.token_config import SourceConfig, folders_of
from tokscale.data.loading.token_loader import by_shape
from tokscale.data.raw.shards import RawDataset
from tokscale.data.tokens.manifest import CLASSES, TokenDataset, buckets_in, read_class_names
from tokscale.dist.comm import Comm
from tokscale.models.common import fit_condition, reads_captions
from tokscale.models.model import ReadBy
from tokscale.models.registry import ModelConfig, model_class
from tokscale.stages.lowres import fit_lowres
from tokscale.stages.monitoring import MonitoredConfig
from tokscale.stages.text_states import TextStates, online_states, text_states
from tokscale.tokenizers.codec import FrozenImageTokenizer
from tokscale.tokenizers.image import load_image_tokenizer
from tokscale.tokenizers.quantize.soft import SoftCodes
from tokscale.tokenizers.text import load_text_tokenizer
from tokscale.tokenizers.text.base import AnyTextTokenizer
from tokscale.tokenizers.text.cut import CutCaptions
from tokscale.tokenizers.text.encoder import FrozenTextEncoder

_MEASURED_BLOCKS = 8
_MEASURED_CAPTIONS = 256
CUT = "captions.json"
"""In a run folder: how much of the captions does not fit."""
log = logger("train")


class InputsConfig(MonitoredConfig):
    """Keys that say what is trained on what."""

    model: ModelConfig
    """What is trained. Sizes that the tokenizers dictate may be left out."""
    data: TokenLoaderConfig = TokenLoaderConfig()
    """Which token shards are read, and how."""
    images: ImageLoaderConfig = ImageLoaderConfig()
    """How the raw images of `data_dir/raw` are read by a model that reads no tokens but images, as CLIP does."""
    batch_size: int = Field(default=64, ge=1)
    """Samples of one optimizer step, over all ranks and micro batches."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What a run says of an image tokenizer: all but its weights, which training does not need."""

    fingerprint: str
    code_shape: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: ImageTokenizer) -> "TokenizerFacts":
        """Of an open one."""
        return cls(tokenizer.fingerprint, tuple(tokenizer.code_shape))


@dataclass(frozen=True)
class Inputs:
    """A model's configuration fitted to its data, and the stream of its batches."""

    model: Any
    loader: TokenLoader | ImageLoader
    data: Sequence[str]
    """Names of the data sets, by content."""
    image: TokenizerFacts | None
    """Whose codes are read, if any; of several shapes of images, for the one with the most samples."""
    text: TextTokenizer | None
    """Whose ids are read, if any."""
    states: TextStates | None = None
    """Of a text encoder that are read, if any."""
    cut: Mapping[str, CutCaptions] = field(default_factory=dict)
    """How much of some captions, spread over the data, does not fit: by the key that decides how much does."""
    held_out: Sequence[TokenLoader | ImageLoader] = ()
    """Samples that training never sees, if any: a loader for each shape of images."""
    further: Sequence[TokenizerFacts] = ()
    """The image tokenizer for the other shapes of images, where there are several."""


def data_files(config: InputsConfig) -> list[Path]:
    """The shards that will be read, as far as they are files of this machine."""
    folders = [config.data_dir / "raw"] if model_class(config.model).reads == "images" else token_folders(config)
    here = [folder for folder in folders if isinstance(folder, Path)]
    return [file for folder in here for file in sorted(folder.glob("*.tar"))]


def token_folders(config: InputsConfig) -> Sequence[Path | str]:
    """Where the token shards lie, of each bucket."""
    return folders_of(config.data, config.data_dir / "tokens")


def open_inputs(config: InputsConfig, comm: Comm) -> Inputs:
    """Open the tokenizers and the data a model needs, and fit its configuration to them.

    Raises:
        ConfigError: When a size was given and is another than the data's.
        DataError: When something is missing, or the token shards hold another tokenizer's ids.
    """
    return OPENED[model_class(config.model).reads](config, comm)


@dataclass(frozen=True)
class _Opened:
    """What one rank has found in the folders of tokenizers and token shards, for all of them."""

    model: Any
    data: TokenLoaderConfig
    datasets: Sequence[TokenDataset]
    images: Sequence[TokenizerFacts]
    """For each shape of images, that with the most samples first."""
    text: TextTokenizer | None
    states: TextStates | None
    soft: SoftCodes | None
    cut: Mapping[str, CutCaptions]
    apart: Sequence[TokenDataset]
    """What is held out, where it lies in a folder of its own."""
    apart_states: TextStates | None
    """Of its captions, where they are stored."""


def _open(config: InputsConfig, online: TextStates | None) -> _Opened:
    """Read what describes the data. By one rank.

    Args:
        config: Of the stage.
        online: An encoder that this rank has opened for itself; not passed on.
    """
    images, datasets = open_token_data(config, load_image_tokenizer(config.image_tokenizer_folder))
    image = images[0]
    text = load_text_tokenizer(config.text_tokenizer_folder) if reads_captions(config.model) else None
    states = online or text_states(config, config.model, datasets, source=config.data.text_embeds)
    fitted: Any = fit_condition(config.model.fitted(image, text), encoder=states, labels=max_labels(datasets))
    if len(images) > 1:
        fitted = fitted.with_grids([tuple(each.code_shape[:2]) for each in images])
    model, data = fit_lowres(fitted, config.data, datasets)
    cut = _measure_cut(datasets, text, model.text_seq_len if text else 0, states)
    for key, found in cut.items():
        if words := found.words(key):
            log.warning("of captions spread over the data, %s", words)
    stored = states if online is None else None
    if data.held_out.share:
        for dataset in datasets:
            Split(
                dataset, data.held_out.share, some=len(images) == 1
            )  # reads every key, once: the other ranks find what that leaves
    apart, apart_states = [], None
    if data.held_out.path is not None:
        apart = [TokenDataset(folder) for folder in buckets_in(data.held_out.path) or [data.held_out.path]]
        for dataset in apart:
            shape = dataset.stream(data.codes).code_shape
            dataset.require({data.codes: next((each for each in images if tuple(each.code_shape) == shape), image)})
        apart_states = text_states(config, config.model, apart, source="stored") if stored else None
    facts, soft = [TokenizerFacts.of(each) for each in images], _soft_codes(config, image)
    return _Opened(model, data, datasets, facts, text, stored, soft, cut, apart, apart_states)


def _tokens(config: InputsConfig, comm: Comm) -> Inputs:
    online = online_states(config, config.model, comm.device) if config.data.text_embeds == "online" else None
    found = comm.on_main("opening the data", lambda: _open(config, online))
    states = online or found.states
    read = partial(
        TokenLoader,
        text_tokenizer=found.text,
        text_encoder=states and states.encoder,
        soft_codes=found.soft,
        comm_rank=comm.rank,
        comm_world=comm.world,
        batch_size=config.batch_size,
        seed=config.seed,
        text_length=found.model.text_seq_len,
        device=comm.device,
    )
    stores = states.stores if states else ()
    loader = read(found.data, manifests=found.datasets, text_embeds=stores)
    held_out, quiet = [], {"shuffle": False, "prefetch": 0}
    for group in by_shape(found.apart, (found.data.codes, *found.data.streams)):
        datasets = [found.apart[at] for at in group]
        alone = quiet | {"sources": tuple(SourceConfig(path=each.folder) for each in datasets), "partitions": 1}
        own = [found.apart_states.stores[at] for at in group] if found.apart_states else ()
        held_out.append(read(found.data.model_copy(update=alone), manifests=datasets, text_embeds=own))
    if found.data.held_out.share:
        whole = found.data.model_copy(update=quiet)
        held_out = read(whole, manifests=found.datasets, text_embeds=stores, held_out=True).by_shape()
    names, (image, *further) = [data.manifest.id for data in found.datasets], found.images
    return Inputs(found.model, loader, names, image, found.text, states, found.cut, held_out, further)


def keep_class_names(config: InputsConfig) -> None:
    """Copy the names of the data's labels into the run folder, from where an export takes them."""
    for folder in token_folders(config):
        if (names := read_class_names(folder, config.data.remote)) is not None:
            write_json(config.run_dir / CLASSES, names)
            return


def _measure_cut(
    datasets: Sequence[TokenDataset], text: TextTokenizer | None, length: int, states: TextStates | None
) -> dict[str, CutCaptions]:
    """Read a few blocks of each data set before training, since what is cut then is never seen."""
    captions: list[str] = []
    for dataset in datasets:
        blocks = len(dataset.sizes)
        for number in sorted({blocks * part // _MEASURED_BLOCKS for part in range(_MEASURED_BLOCKS)} if blocks else ()):
            block = dataset.read(number)
            captions += [caption for row in range(len(block)) for caption in block.captions(row)][:_MEASURED_CAPTIONS]
    found: dict[str, CutCaptions] = {}
    if text is not None and captions and isinstance(text, AnyTextTokenizer) and text.config.on_long == "truncate":
        found["model.text_seq_len"] = CutCaptions()
        for tokens in text.encode_ragged(captions):
            found["model.text_seq_len"].add(len(tokens), length)
    if states is not None and isinstance(states.encoder, FrozenTextEncoder) and captions:
        before, states.encoder.cut = states.encoder.cut, CutCaptions()
        states.encoder.tokenize(captions)
        found["text_encoder_length"], states.encoder.cut = states.encoder.cut, before
    return found


def _soft_codes(config: InputsConfig, image: FrozenImageTokenizer) -> SoftCodes | None:
    if config.data.soft_codes is None:
        return None
    if not model_class(config.model).reads_soft_codes:
        raise ConfigError(
            f"data.soft_codes: model.kind={kind_of(config.model)} takes no soft targets; leave the key out"
        )
    return SoftCodes(image, config.data.soft_codes, config.seed)


def _images(config: InputsConfig, comm: Comm) -> Inputs:
    model, facts, text, dataset = comm.on_main("opening the data", lambda: _open_images(config))
    read = partial(
        ImageLoader,
        image_size=model.visual_image_size,
        channels=model.channels,
        text_tokenizer=text,
        text_length=model.text_seq_len,
        comm_rank=comm.rank,
        comm_world=comm.world,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    loader, held_out = open_images(config.images, dataset, read)
    return Inputs(model, loader, [], facts, text, held_out=() if held_out is None else (held_out,))


def open_images(
    config: ImageLoaderConfig, dataset: RawDataset, read: Callable[..., ImageLoader]
) -> tuple[ImageLoader, ImageLoader | None]:
    """The images of training, and those that are held out from it.

    Args:
        config: How to read, and what to hold out.
        dataset: The raw shards.
        read: Makes a loader of a configuration and a `dataset`.
    """
    quiet, held_out = config.model_copy(update={"shuffle": False, "prefetch": 0, "flips": False}), None
    if config.held_out.share:
        held_out = read(quiet, dataset=dataset, held_out=True)
    elif config.held_out.path is not None:
        held_out = read(quiet, dataset=RawDataset(config.held_out.path))
    return read(config, dataset=dataset), held_out


def _open_images(config: InputsConfig) -> tuple[Any, TokenizerFacts | None, TextTokenizer, RawDataset]:
    # An image tokenizer that is named says the size of the images; the model reads no codes of it.
    image = None if config.image_tokenizer is None else load_image_tokenizer(config.image_tokenizer)
    text = load_text_tokenizer(config.text_tokenizer_folder)
    model: Any = config.model.fitted(image, text)
    if model.visual_image_size is None:
        raise ConfigError("model.visual_image_size: give the side of the images, or image_tokenizer=FOLDER to take its")
    facts = None if image is None else TokenizerFacts.of(image)
    return model, facts, text, RawDataset(config.data_dir / "raw")


OPENED = for_each(ReadBy, {"images": _images, "codes": _tokens})
"""By what a model reads."""


def open_token_data(
    config: InputsConfig, image: FrozenImageTokenizer
) -> tuple[list[FrozenImageTokenizer], list[TokenDataset]]:
    """The token shards of a configuration, checked to hold ids of `image`, and that for the sizes of their images.

    There is one for each shape of images, that with the most samples first.

    Raises:
        DataError: When they are missing or hold another tokenizer's ids; names both fingerprints.
    """
    datasets = open_sources(config.data, config.data_dir / "tokens")
    found: dict[tuple[int, ...], tuple[FrozenImageTokenizer, int]] = {}
    for dataset in datasets:
        stored = dataset.stream(config.data.codes)
        matched, samples = found.get(stored.code_shape, (image.matching(stored.tokenizer, stored.code_shape), 0))
        dataset.require({config.data.codes: matched})
        found[stored.code_shape] = matched, samples + dataset.samples
    return [matched for matched, _ in sorted(found.values(), key=lambda entry: -entry[1])], datasets


def max_labels(datasets: Sequence[TokenDataset]) -> int | None:
    """Labels of all data sets together are in `[0, max_labels)`; None when one has none."""
    counts = [dataset.manifest.labels for dataset in datasets]
    return None if None in counts else max(count for count in counts if count is not None)
